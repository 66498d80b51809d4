"""What happened to the particles, to look at: a figure, and a page with it and the numbers."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .cloud import Trace

STYLE = (
    "body{font:15px/1.5 sans-serif;margin:2em auto;max-width:75em;padding:0 1em}td,th{padding:.2em 1em;text-align:right}"
    "img.trace{max-width:100%}img.tip{height:40px;image-rendering:pixelated;vertical-align:middle}p{max-width:50em}"
)
HEAD = ("group", "image", "log Z", "mean ESS", "smallest ESS", "resamplings", "starts left", "kept", "descends from")
LEGEND = (
    "Each group is a population of particles for one image. The effective sample size (ESS) says how many particles carry the "
    "weight before resampling; dots are resamplings. Where it falls near 1, the run picked the best of its particles rather "
    "than sampled the target. log Z is the log of the target's normaliser, estimated so far. In the family tree colours are "
    "starting particles, grey lines died out, and black dashes lead to the particle that was kept."
)


def trace_figure(
    trace: Trace,
    path: str | Path,
    *,
    group: int = 0,
    images: Tensor | None = None,
    kept: int | None = None,
    title: str = "",
) -> Path:
    """Draw effective sample sizes, log Z and surviving ancestors of all groups, and the family tree of one.

    Args:
        trace: of a `Cloud` or a run.
        path: PNG to write.
        group: whose tree.
        images: (K, C, H, W) in [0, 1], the group's final particles, put at the tips of the tree; with ``kept`` also (1, C, H,
            W), the kept one alone.
        kept: the particle that became the image, whose line is marked.
        title: above the figure.

    Returns:
        ``path``.

    Raises:
        ValueError: an empty trace, a group or a kept particle that it does not have, or another number of images.
    """
    if not trace.ess:
        raise ValueError("the trace is empty: nothing has run")
    sizes, log_z, alive = (v.cpu() for v in (torch.stack(trace.ess), torch.stack(trace.log_z), trace.surviving()))
    groups = len(trace.ancestors[0])
    if not 0 <= group < groups:
        raise ValueError(f"group {group} is outside 0..{groups - 1}")
    k = trace.ancestors[0].shape[-1]
    if kept is not None and not 0 <= kept < k:
        raise ValueError(f"kept particle {kept} is outside 0..{k - 1}")
    if images is not None and len(images) != k and not (len(images) == 1 and kept is not None):
        raise ValueError(f"{len(images)} images for {k} particles")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.4))
    panels = top.subplots(1, 3)
    for axes, values, name in zip(panels, (sizes, log_z, alive), _TITLES, strict=True):
        if groups > 1:
            axes.plot(values.numpy(), color="0.75", linewidth=0.8)
            axes.plot([], color="0.75", linewidth=0.8, label="other groups")
        axes.plot(values[:, group].numpy(), color="C0", label=f"group {group}")
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("step")
    hit = torch.stack([r[group] for r in trace.resampled]).cpu().nonzero()[:, 0]
    panels[0].plot(hit.numpy(), sizes[hit, group].numpy(), "o", color="C0", markersize=4, label="resampled")
    for axes in (panels[0], panels[2]):
        axes.set_ylim(0, 1.05 * k)
    panels[1].legend(fontsize=8, frameon=False)
    panels[0].legend(fontsize=8, frameon=False, loc="lower left")
    _tree(bottom.subplots(1, 1), trace, group, images, kept)
    if title:
        figure.suptitle(title)
    path = Path(path)
    figure.savefig(path, dpi=110)
    return path


_TITLES = ("effective sample size", "log Z so far", "starting particles with descendants")


def _tree(axes: Any, trace: Trace, group: int, images: Tensor | None, kept: int | None) -> None:
    """Lines from each particle to the one it continues, dark where the line reaches the end."""
    from matplotlib.colors import Normalize
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage

    ancestors = torch.stack([a[group] for a in trace.ancestors]).cpu()
    steps, k = ancestors.shape
    roots = trace.roots()[-1, group].cpu().tolist()
    reached = torch.zeros(steps + 1, k, dtype=torch.bool)
    reached[steps] = True
    for step in range(steps - 1, -1, -1):
        reached[step, ancestors[step][reached[step + 1]]] = True
    color_of = {root: f"C{i % 10}" for i, root in enumerate(dict.fromkeys(roots))}
    origin = torch.arange(k)
    for step in range(steps):
        origin = origin[ancestors[step]]
        for child in range(k):
            lives = bool(reached[step + 1, child])
            color, width = (color_of[int(origin[child])], 1.6) if lives else ("0.85", 0.6)
            axes.plot((step, step + 1), (int(ancestors[step, child]), child), color=color, linewidth=width, zorder=1 + lives)
    if kept is not None:
        line = [kept]
        for row in ancestors.flip(0).tolist():
            line.append(row[line[-1]])
        axes.plot(range(steps, -1, -1), line, color="black", linewidth=0.9, linestyle=(0, (4, 2)), zorder=3)
        axes.plot(steps, kept, "s", color="black", markersize=5, zorder=3)
    axes.set_title(f"family tree of group {group}: colours are starting particles, grey lines died out", fontsize=10)
    axes.set_xlabel("step")
    axes.set_ylabel("particle")
    axes.set_xlim(0, steps * 1.04 + 0.5)
    axes.set_ylim(k - 0.5, -0.5)
    if images is not None:
        tips = range(k) if len(images) == k or kept is None else (kept,)
        for child, image in zip(tips, images.cpu().float().clamp(0, 1), strict=True):
            picture = image.permute(1, 2, 0).numpy()
            picture = picture[..., 0] if picture.shape[-1] == 1 else picture
            zoom, plain = 30 / max(picture.shape[:2]), Normalize(0, 1)
            box = OffsetImage(picture, zoom=zoom, cmap="gray", norm=plain, interpolation="nearest")
            axes.add_artist(AnnotationBbox(box, (steps * 1.02, child), frameon=False, pad=0))


def trace_page(
    trace: Trace,
    path: str | Path,
    *,
    names: Sequence[str] = (),
    facts: Mapping[str, Any] | None = None,
    images: Tensor | None = None,
    kept: Sequence[int] | None = None,
    pictures: Sequence[Tensor] | None = None,
) -> Path:
    """Write a self-contained HTML page: the figure of the first group, and a row of numbers for each.

    Args:
        trace: of a `Cloud` or a run.
        path: HTML file; the figure is also written beside it, as a PNG of the same name.
        names: of the groups (prompts, labels); their numbers by default.
        facts: more lines, name -> value.
        images: as in `trace_figure`; by default the first of ``pictures``.
        kept: per group, the particle that became the image.
        pictures: per group, that image (C, H, W) in [0, 1].

    Returns:
        ``path``.

    Raises:
        ValueError: see `trace_figure`.
    """
    path = Path(path)
    if images is None and pictures is not None:
        images = pictures[0][None]
    picture = trace_figure(trace, path.with_suffix(".png"), images=images, kept=None if kept is None else kept[0])
    sizes, alive = torch.stack(trace.ess).cpu(), trace.surviving().cpu()
    log_z, resampled = trace.log_z[-1].cpu(), torch.stack(trace.resampled).sum(0).cpu()
    k, roots = trace.ancestors[0].shape[-1], trace.roots()[-1].cpu()
    rows = []
    for p in range(sizes.shape[1]):
        name = names[p] if p < len(names) else str(p)
        tip = "" if pictures is None else f'<img class="tip" src="data:image/png;base64,{_png(pictures[p])}" alt="">'
        ess = (f"{float(sizes[:, p].mean()):.2f} of {k}", f"{float(sizes[:, p].min()):.2f}")
        last = ("", "") if kept is None else (kept[p], int(roots[p, kept[p]]))
        cells = (html.escape(name), tip, f"{float(log_z[p]):.3f}", *ess, int(resampled[p]), int(alive[-1, p]), *last)
        rows.append("".join(f"<td>{c}</td>" for c in cells))
    lines = dict(facts or {})
    if (applied := trace.applied()) < 1.0:
        lines["log-weights applied"] = f"{applied:.1%}"
    if (clipped := trace.clipped_share()) > 0.0:
        lines["increments clipped"] = f"{clipped:.1%}"
    listed = "".join(f"<li>{html.escape(str(name))}: {html.escape(str(value))}</li>" for name, value in lines.items())
    data = base64.b64encode(picture.read_bytes()).decode()
    head = "".join(f"<th>{name}</th>" for name in HEAD)
    page = (
        f"<!doctype html><meta charset=utf-8><title>particles</title><style>{STYLE}</style><h1>Particles</h1><ul>{listed}</ul>"
        f"<p>{LEGEND}</p>"
        f'<img class="trace" src="data:image/png;base64,{data}" alt="trace"><table><tr>{head}</tr>'
        + "".join(f"<tr>{row}</tr>" for row in rows)
        + "</table>\n"
    )
    partial = path.with_name(path.name + ".part")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)
    return path


def _png(image: Tensor) -> str:
    """A picture (C, H, W) in [0, 1] as base64."""
    from matplotlib.image import imsave

    values, buffer = image.cpu().float().clamp(0, 1).permute(1, 2, 0).numpy(), io.BytesIO()
    imsave(buffer, values[..., 0] if values.shape[-1] == 1 else values, cmap="gray", vmin=0.0, vmax=1.0, format="png")
    return base64.b64encode(buffer.getvalue()).decode()

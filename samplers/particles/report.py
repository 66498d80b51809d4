"""What happened to the particles, to look at: a figure, and a page with it and the numbers."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .cloud import Trace

STYLE = "body{font:15px sans-serif;margin:2em;max-width:75em}td,th{padding:.2em 1em;text-align:right}img{max-width:100%}"


def trace_figure(trace: Trace, path: str | Path, *, group: int = 0, images: Tensor | None = None, title: str = "") -> Path:
    """Draw effective sample sizes, log Z and surviving ancestors of all groups, and the family tree of one.

    Args:
        trace: of a `Cloud` or a run.
        path: PNG to write.
        group: whose tree.
        images: (K, C, H, W) in [0, 1], the group's final particles, put at the tips of the tree.
        title: above the figure.

    Returns:
        ``path``.

    Raises:
        ValueError: an empty trace, or a group that it does not have.
    """
    if not trace.ess:
        raise ValueError("the trace is empty: nothing has run")
    sizes, log_z, alive = (v.cpu() for v in (torch.stack(trace.ess), torch.stack(trace.log_z), trace.surviving()))
    groups = len(trace.ancestors[0])
    if not 0 <= group < groups:
        raise ValueError(f"group {group} is outside 0..{groups - 1}")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.4))
    for axes, values, name in zip(top.subplots(1, 3), (sizes, log_z, alive), _TITLES, strict=True):
        axes.plot(values.numpy(), color="0.7", linewidth=0.8)
        axes.plot(values[:, group].numpy(), color="C0", label=f"group {group}")
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("step")
    _tree(bottom.subplots(1, 1), trace, group, images)
    if title:
        figure.suptitle(title)
    path = Path(path)
    figure.savefig(path, dpi=110)
    return path


_TITLES = ("effective sample size", "log Z so far", "starting particles with descendants")


def _tree(axes: Any, trace: Trace, group: int, images: Tensor | None) -> None:
    """Lines from each particle to the one it continues, dark where the line reaches the end."""
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
    axes.set_title(f"family tree of group {group}: colours are starting particles, grey lines died out", fontsize=10)
    axes.set_xlabel("step")
    axes.set_ylabel("particle")
    axes.set_xlim(0, steps * 1.04 + 0.5)
    axes.set_ylim(k - 0.5, -0.5)
    if images is not None:
        for child, image in enumerate(images.cpu().float().clamp(0, 1)):
            picture = image.permute(1, 2, 0).numpy()
            picture = picture[..., 0] if picture.shape[-1] == 1 else picture
            box = OffsetImage(picture, zoom=24 / max(picture.shape[:2]), cmap="gray")
            axes.add_artist(AnnotationBbox(box, (steps * 1.02, child), frameon=False, pad=0))


def trace_page(
    trace: Trace,
    path: str | Path,
    *,
    names: Sequence[str] = (),
    facts: Mapping[str, Any] | None = None,
    images: Tensor | None = None,
) -> Path:
    """Write a self-contained HTML page: the figure of the first group, and a row of numbers for each.

    Args:
        trace: of a `Cloud` or a run.
        path: HTML file; the figure is also written beside it, as a PNG of the same name.
        names: of the groups (prompts, labels); their numbers by default.
        facts: more lines, name -> value.
        images: as in `trace_figure`.

    Returns:
        ``path``.

    Raises:
        ValueError: see `trace_figure`.
    """
    path = Path(path)
    picture = trace_figure(trace, path.with_suffix(".png"), images=images)
    sizes, alive = torch.stack(trace.ess).cpu(), trace.surviving().cpu()
    log_z, resampled = trace.log_z[-1].cpu(), torch.stack(trace.resampled).sum(0).cpu()
    k = trace.ancestors[0].shape[-1]
    rows = []
    for p in range(sizes.shape[1]):
        name = names[p] if p < len(names) else str(p)
        cells = (html.escape(name), f"{float(log_z[p]):.3f}", f"{float(sizes[:, p].mean()):.2f} of {k}")
        rows.append("".join(f"<td>{c}</td>" for c in (*cells, int(resampled[p]), int(alive[-1, p]))))
    lines = {
        "log-weights applied": f"{trace.applied():.1%}",
        "increments clipped": f"{trace.clipped_share():.1%}",
        **(facts or {}),
    }
    listed = "".join(f"<li>{html.escape(str(name))}: {html.escape(str(value))}</li>" for name, value in lines.items())
    data = base64.b64encode(picture.read_bytes()).decode()
    head = "".join(f"<th>{name}</th>" for name in ("group", "log Z", "mean ESS", "resamplings", "ancestors left"))
    page = (
        f"<!doctype html><meta charset=utf-8><title>particles</title><style>{STYLE}</style><h1>Particles</h1><ul>{listed}</ul>"
        f'<img src="data:image/png;base64,{data}" alt="trace"><table><tr>{head}</tr>'
        + "".join(f"<tr>{row}</tr>" for row in rows)
        + "</table>\n"
    )
    partial = path.with_name(path.name + ".part")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)
    return path

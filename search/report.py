"""A search as one HTML page: curves, the predictor's calibration, what the good schedules share, times, pictures."""

from __future__ import annotations

import base64
import html
import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from samplers import SolverSchedule

from .find import Found
from .objective import Objective
from .study import TrialRecord

STYLE = "body{font:15px sans-serif;max-width:60em;margin:2em auto}td,th{padding:.2em .8em;text-align:left}img{max-width:100%}"


def write_report(
    found: Found,
    path: Path,
    *,
    test: Objective | None = None,
    decode: Callable[[Tensor], Tensor] | None = None,
    images: int = 10,
) -> None:
    """Write the page, whole or not at all; everything is inside the file.

    Args:
        found: what `search.find.find_schedule` returned.
        path: of the HTML file.
        test: held-out objective whose samples are shown.
        decode: states -> images (B, C, H, W) in [0, 1]; no pictures without it.
        images: columns of the picture.
    """
    sections = [
        ("Held-out error", _scores(found)),
        ("Best so far", _figure(_curve(found.result.trials))),
        ("Predictor", _figure(_stages(found.result.stages)) if found.result.stages else "<p>This strategy has none.</p>"),
        ("What the better half has more of", _components(found.result.trials)),
        ("Times of the best schedules", _figure(_times(found))),
    ]
    if test is not None and decode is not None and test.reference is not None:
        sections.append(("Before and after", _figure(_pictures(found, test, decode, images))))
    body = "".join(f"<h2>{title}</h2>{content}" for title, content in sections)
    name = html.escape(found.schedule.name)
    page = f"<!doctype html><meta charset=utf-8><title>{name}</title><style>{STYLE}</style><h1>{name}</h1>{body}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)


def _figure(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    return f'<img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    def line(cells: tuple[Any, ...], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line(head, "th") + "".join(line(row, "td") for row in rows) + "</table>"


def _scores(found: Found) -> str:
    rows = [
        (label, score.name, f"{score.value:.5f}", f"{score.low:.5f} .. {score.high:.5f}")
        for label, score in (("found", found.test), ("search alone", found.searched), *found.baselines.items())
    ]
    gap = ", ".join(f"{split} {value:.5f}" for split, value in found.gap.items())
    table = _table(("", "schedule", "RMSE", "95% interval"), rows)
    return f"{table}<p>Ratio to the best baseline: {found.ratio:.3f}. Found schedule on its noises: {gap}.</p>"


def _curve(trials: list[TrialRecord]) -> Figure:
    figure = Figure(figsize=(7, 3))
    axes = figure.subplots()
    values = [record.value for record in trials]
    axes.plot(values, ".", color="0.7", label="trials")
    axes.plot(np.minimum.accumulate(values), label="best so far")
    axes.set(xlabel="trial", ylabel="objective", yscale="log")
    axes.set_ylim(top=float(np.quantile(values, 0.9)) * 1.5)
    axes.legend()
    return figure


def _stages(stages: list[dict[str, float]]) -> Figure:
    figure = Figure(figsize=(7, 2.5))
    axes = figure.subplots()
    axes.plot([s["trials"] for s in stages], [s["tau"] for s in stages], "o-")
    axes.axhline(0, color="0.7")
    axes.set(xlabel="trials known", ylabel="Kendall's tau, held-out trials", ylim=(-1, 1))
    return figure


def _components(trials: list[TrialRecord]) -> str:
    """Share of steps with each gene value in the better half of the trials and in the worse."""
    ranked = [record.schedule for record in sorted(trials, key=lambda record: record.value)]
    if len(ranked) < 2:
        return "<p>Too few trials.</p>"
    halves = [_genes(half) for half in (ranked[: len(ranked) // 2], ranked[len(ranked) // 2 :])]
    keys = sorted({*halves[0], *halves[1]}, key=lambda key: halves[1][key] - halves[0][key])
    rows = [(key, f"{halves[0][key]:.0%}", f"{halves[1][key]:.0%}") for key in keys]
    return _table(("gene", "better half", "worse half"), rows)


def _genes(schedules: list[SolverSchedule]) -> Counter[str]:
    counts: Counter[str] = Counter()
    total = sum(len(schedule.steps) for schedule in schedules)
    for schedule in schedules:
        for step in schedule.steps:
            counts[f"order {step.order}"] += 1
            counts[f"prediction {'mixed' if isinstance(step.pred, tuple) else step.pred}"] += 1
            counts[f"axis {step.axis}"] += 1
            counts["corrector"] += step.corr is not None
            counts["relaxed derivative"] += bool(step.relax)
            counts["low-order derivative"] += bool(step.d_nodes)
            counts["single-step (earlier start)"] += step.start < -1
        counts["analytic first step (of schedules)"] += schedule.analytic_first_step * len(schedule.steps)
    return Counter({key: count / total for key, count in counts.items() if count})


def _times(found: Found) -> Figure:
    figure = Figure(figsize=(7, 3))
    axes = figure.subplots()
    rows = {"found": found.schedule, **{f"#{i + 1} of the search": r.schedule for i, r in enumerate(found.result.top(5))}}
    rows |= {kind: score.schedule for kind, score in found.baselines.items()}
    for y, schedule in enumerate(rows.values()):
        axes.plot(schedule.times, [y] * len(schedule.times), "o-", markersize=4)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set(xlabel="t")
    axes.invert_yaxis()
    return figure


def _pictures(found: Found, test: Objective, decode: Callable[[Tensor], Tensor], images: int) -> Figure:
    few = test.head(images)
    assert few.reference is not None
    best = min(found.baselines.values(), key=lambda score: score.value)
    rows = {"converged": few.reference, "found": few.samples(found.schedule), best.name: few.samples(best.schedule)}
    figure = Figure(figsize=(images, 1.2 * len(rows)))
    for axes, (label, states) in zip(figure.subplots(len(rows), 1), rows.items(), strict=True):
        picture = torch.cat(list(decode(states).detach().cpu()), dim=-1).permute(1, 2, 0)
        axes.imshow(picture.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(label, fontsize=8, loc="left")
        axes.axis("off")
    return figure

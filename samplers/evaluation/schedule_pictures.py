"""A solver schedule drawn: where it evaluates the network, and how much each answer weighs in every later state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import SubFigure
from matplotlib.lines import Line2D
from torch import Tensor

from ..noise import NoiseSchedule
from ..strategy import SolverSchedule
from ..tableau import Tableau

WIDEST_LAMBDA = 8.0  # infinite ends are drawn here
NUMBERS_UP_TO = 13  # states with more answers than that get colours without numbers
COLOURS = {"x0": "tab:blue", "eps": "tab:orange", "flow": "tab:green", "v3": "tab:purple", "v3-nodes": "tab:purple"}
MIXED = "tab:red"


def answer_weights(tableau: Tableau) -> tuple[Tensor, Tensor]:
    """Every state as a weighted sum of the network's answers and the starting noise, with nothing in between left.

    Args:
        tableau: a compiled schedule; coefficients that vary over the pixels count as their mean.

    Returns:
        (states, answers) weights of the answers in x1, x2, ...; (states,) weights of the starting noise. Constants (a data
        mean, statistics) and fresh noise are left out.
    """
    n = len(tableau.stages)
    known: dict[str, Tensor] = {"x0": torch.cat([torch.zeros(n), torch.ones(1)]).double()}
    states: dict[int, Tensor] = {}
    for k, stage in enumerate([None, *tableau.stages]):
        if stage is not None:
            answer = torch.zeros(n + 1, dtype=torch.float64)
            answer[k - 1] = 1.0
            known[stage.query.output] = answer
            if stage.raw is not None:
                known[stage.raw] = answer
        for row in tableau.opening if stage is None else stage.rows:
            total = torch.zeros(n + 1, dtype=torch.float64)
            for name, value in row.terms:
                if name in known:
                    total = total + torch.as_tensor(value, dtype=torch.float64).detach().mean() * known[name]
            known[row.target] = total
            if row.target[0] == "x":
                states[int(row.target[1:])] = total
    table = torch.stack([states[i] for i in sorted(states)])
    return table[:, :n], table[:, n]


def schedule_figure(
    schedules: Sequence[SolverSchedule],
    noise: NoiseSchedule | Sequence[NoiseSchedule],
    path: Path,
    *,
    tableaus: Sequence[Tableau] | None = None,
    labels: Sequence[str] | None = None,
) -> None:
    """Draw schedules into a PNG: their times on one lambda axis, and below it the weights of the network's answers.

    Args:
        schedules: one or more.
        noise: their noise schedule, or one each.
        path: the PNG, written whole or not at all.
        tableaus: the compiled schedules, where they need more than the noise schedule.
        labels: names to show instead of the schedules' own.
    """
    levels = [noise] * len(schedules) if isinstance(noise, NoiseSchedule) else list(noise)
    names = [s.name or f"schedule {i + 1}" for i, s in enumerate(schedules)] if labels is None else list(labels)
    if tableaus is None:
        tableaus = [_compiled(s, own) for s, own in zip(schedules, levels, strict=True)]
    weights = [answer_weights(tableau)[0] for tableau in tableaus]
    tallest = max(len(table) for table in weights)
    grid_height, map_height = 1.9 + 0.6 * len(schedules), max(2.2, 0.5 + 0.34 * tallest)
    figure = plt.figure(figsize=(max(10.0, 5.6 * len(schedules)), grid_height + map_height), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(grid_height, map_height))
    top, bottom = parts
    _draw_times(top, schedules, levels, names)
    panels = bottom.subplots(1, len(schedules), squeeze=False)[0]
    for axis, table, tableau, name in zip(panels, weights, tableaus, names, strict=True):
        _draw_weights(axis, table, tableau, name if len(schedules) > 1 else "")
    partial = path.with_name(path.name + ".part")
    figure.savefig(partial, dpi=130, format="png")
    plt.close(figure)
    partial.replace(path)


def _compiled(schedule: SolverSchedule, noise: NoiseSchedule) -> Tableau:
    mean = torch.zeros(1) if schedule.steps[0].eval.source == "average_x0" else None
    return Tableau.build(schedule, noise, first_x0=mean)


def _draw_times(
    subfigure: SubFigure, schedules: Sequence[SolverSchedule], levels: Sequence[NoiseSchedule], names: Sequence[str]
) -> None:
    axis = subfigure.subplots()
    for y, (schedule, noise) in enumerate(zip(schedules, levels, strict=True)):
        finite = [v for t in schedule.times if math.isfinite(v := noise.lam(t).item())]
        ends = max(min(finite) - 1, -WIDEST_LAMBDA), min(max(finite) + 1, WIDEST_LAMBDA)
        at = [min(max(noise.lam(t).item(), ends[0]), ends[1]) for t in schedule.times]
        axis.plot(at, [y] * len(at), color="0.8", zorder=0)
        for i, step in enumerate(schedule.steps):
            colour = COLOURS.get(step.pred, MIXED) if isinstance(step.pred, str) else MIXED
            evaluated = step.eval.source == "model"
            if step.corr is not None:
                axis.scatter(at[i + 1], y, s=190, facecolors="none", edgecolors="black", linewidths=1.1, zorder=1)
            axis.scatter(at[i], y, s=70, color=colour if evaluated else "white", edgecolors=colour, linewidths=1.4, zorder=2)
            back = step.eval.source == "none"
            text, offset = ("+ noise", -17) if back else (str(step.order), 9)
            axis.annotate(text, (at[i], y), xytext=(0, offset), textcoords="offset points", ha="center", fontsize=8)
        last = noise.lam(schedule.times[-1]).item()
        axis.scatter(at[-1], y, marker=">" if not math.isfinite(last) else "|", color="black", s=60, zorder=2)
    axis.set_yticks(range(len(schedules)), names)
    axis.set_ylim(len(schedules) - 0.5, -0.65)
    axis.set_xlabel(
        r"$\lambda = \log(\alpha / \sigma)$   (noise on the left, data on the right; the arrow goes to $\sigma = 0$)"
    )
    above = axis.secondary_xaxis("top")
    low, high = axis.get_xlim()
    ticks = [s for s in (1000, 100, 30, 10, 3, 1, 0.3, 0.1, 0.03, 0.01, 0.001) if low < -math.log(s) < high]
    above.set_xticks([-math.log(s) for s in ticks], [f"{s:g}" for s in ticks], fontsize=8)
    above.set_xlabel(r"$\sigma / \alpha$", fontsize=9)
    used = {(s.pred if isinstance(s.pred, str) else "(l, r)") for schedule in schedules for s in schedule.steps}
    marks = [_mark(COLOURS.get(pred, MIXED), f"expands {pred}") for pred in sorted(used)]
    if any(step.eval.source != "model" for schedule in schedules for step in schedule.steps):
        marks.append(_mark("white", "no evaluation", edge="0.4"))
    if any(step.corr is not None for schedule in schedules for step in schedule.steps):
        ring = Line2D([], [], marker="o", linestyle="", markersize=11, markerfacecolor="none", markeredgecolor="black")
        ring.set_label("corrected")
        marks.append(ring)
    subfigure.legend(handles=marks, loc="outside lower center", ncols=len(marks), fontsize=8, frameon=False)
    axis.set_title("where the network is evaluated; numbers are orders", fontsize=10)
    for side in ("left", "right"):
        axis.spines[side].set_visible(False)


def _mark(colour: str, label: str, edge: str | None = None) -> Line2D:
    return Line2D([], [], marker="o", linestyle="", markersize=8, color=colour, markeredgecolor=edge or colour, label=label)


def _draw_weights(axis: Axes, table: Tensor, tableau: Tableau, name: str) -> None:
    states, answers = table.shape
    largest = max(float(table.abs().max()), 1e-12)
    shown = table.clone()
    shown[table == 0] = math.nan
    scale = TwoSlopeNorm(0.0, -largest, largest)
    axis.imshow(shown.numpy(), cmap="RdBu", norm=scale, aspect="auto")
    if answers <= NUMBERS_UP_TO:
        for i in range(states):
            for j in range(answers):
                if value := float(table[i, j]):
                    dark = abs(value) > 0.6 * largest
                    axis.text(
                        j,
                        i,
                        f"{value + 0.0:.2f}".replace("-0.00", "0.00"),
                        ha="center",
                        va="center",
                        fontsize=7,
                        color="white" if dark else "black",
                    )
    evaluated = [f"t={float(stage.query.t):.3g}" for stage in tableau.stages]
    every = max(1, answers // NUMBERS_UP_TO)
    axis.set_xticks(range(0, answers, every), evaluated[::every], fontsize=7, rotation=30 if answers > 8 else 0)
    rows = range(0, states, max(1, states // 20))
    axis.set_yticks(rows, [f"x{i + 1}" for i in rows], fontsize=8)
    axis.set_xlabel("answer of the network at", fontsize=9)
    axis.set_title(
        f"{name}: weight of every answer in every state" if name else "weight of every answer in every state", fontsize=10
    )

"""``fewstep schedule show``: a solver schedule as a table that can be followed step by step, and two of them side by side."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .common import JsonOption, out_console
from .schedule_inputs import NfeOption, NoiseOption, StatisticsOption, compiled, inputs

PlotOption = Annotated[Path | None, typer.Option("--plot", help="Also draw it into this PNG.")]
CompareOption = Annotated[
    tuple[str, str] | None, typer.Option("--compare", help="Two samplers to put side by side, instead of one to show.")
]
ShownArgument = Annotated[str | None, typer.Argument(help="Recipe text, path of a JSON schedule, or a shipped name.")]
EQUAL = 1e-9  # coefficients this near are the same solver


@dataclass(frozen=True)
class Step:
    """One step in words.

    Attributes:
        time: from where to where, in the noise schedule's t.
        level: the same as sigma / alpha.
        rule: order, what is expanded and in which variable.
        reads: nodes whose predictions are used, and what is special about them.
        corrector: what redoes the step once the network has answered at its end, or "".
        update: the compiled row.
    """

    time: str
    level: str
    rule: str
    reads: str
    corrector: str
    update: str


def show_schedule(
    sampler: ShownArgument = None,
    nfe: NfeOption = None,
    noise: NoiseOption = None,
    plot: PlotOption = None,
    compare: CompareOption = None,
    statistics: StatisticsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show a schedule step by step, or compare two."""
    if (sampler is None) == (compare is None):
        raise ValueError("give either one sampler, or two with --compare A B")
    names = (sampler,) if compare is None else compare
    shown = [(name, *inputs(str(name), noise, nfe)) for name in names]
    tableaus = [compiled(schedule, levels, statistics) for _, schedule, levels in shown]
    if plot is not None:
        from ..evaluation import schedule_figure

        labels = [schedule.name or str(name) for name, schedule, _ in shown]
        schedule_figure([s for _, s, _ in shown], [levels for _, _, levels in shown], plot, tableaus=tableaus, labels=labels)
    if as_json:
        content = [schedule.to_dict() for _, schedule, _ in shown]
        typer.echo(json.dumps(content[0] if compare is None else content))
        return
    steps = [described(s, levels, tableau) for (_, s, levels), tableau in zip(shown, tableaus, strict=True)]
    for (name, schedule, levels), tableau in zip(shown, tableaus, strict=True):
        out_console.print(summary(str(name), schedule, levels, tableau))
    if compare is None:
        _print_steps(steps[0])
    else:
        _print_both(names, [s for _, s, _ in shown], steps, tableaus)
    legend = "t: time; level: sigma / alpha; x: states, c: corrected states, d: x0-predictions, by node (0 is the start)"
    out_console.print(legend, style="dim")


def summary(name: str, schedule: Any, levels: Any, tableau: Any) -> str:
    """What the whole schedule costs and needs, in one line."""
    facts = [f"NFE {schedule.nfe}", f"{len(schedule.steps)} steps", f"noise schedule {levels.kind}"]
    if tableau.depth != schedule.nfe:
        facts.append(f"{tableau.depth} evaluations in a row, the others beside them")
    if schedule.analytic_first_step:
        facts.append(f"analytic first step ({schedule.steps[0].eval.source})")
    if schedule.stochastic:
        facts.append("draws noise")
    if schedule.clip is not None:
        facts.append(
            "x0 clipped as the scheduler's config says" if schedule.clip == "config" else f"x0 clipped to {schedule.clip:g}"
        )
    if factors := schedule.provenance.get("skip_coefficients"):
        facts.append(
            f"published with U-Net skips scaled by {min(factors):g} to {max(factors):g}, which is not part of the solver"
        )
    return f"{schedule.name or name}: {', '.join(facts)}"


def described(schedule: Any, levels: Any, tableau: Any) -> list[Step]:
    """Every step in words."""
    rows = {row.target: row for row in (*tableau.opening, *(row for stage in tableau.stages for row in stage.rows))}
    out = []
    for i, step in enumerate(schedule.steps):
        ends = schedule.times[i], schedule.times[i + 1]
        level = " -> ".join(_number(math.exp(-v) if (v := levels.lam(t).item()) > -700 else math.inf) for t in ends)
        update = " ".join(f"{_coefficient(value)} {name}" for name, value in rows[f"x{i + 1}"].terms)
        if rows[f"x{i + 1}"].noise:
            update += f" {_coefficient(rows[f'x{i + 1}'].noise)} noise"
        time = " -> ".join(_number(t) for t in ends)
        out.append(Step(time, level, _rule(step), _reads(schedule, i), _corrector(step), f"x{i + 1} = {update}"))
    return out


def _number(value: float) -> str:
    return f"{value:.4g}"


def _coefficient(value: Any) -> str:
    """A coefficient; the mean of one that varies over the pixels."""
    import torch

    if torch.is_tensor(value) and value.numel() > 1:
        return f"{value.double().mean().item():+.4g}*"
    return f"{float(value):+.4g}"


def _rule(step: Any) -> str:
    if step.eval.source == "none":
        return "adds noise"
    pred = step.pred if isinstance(step.pred, str) else f"l={step.pred[0]:g}, r={step.pred[1]:g}"
    axis = "" if step.order == 1 or step.axis == "lambda" else f" in {step.axis}"
    noise = "" if step.noise is None else f", {step.noise.kind} {step.noise.amount:g}"
    return f"order {step.order}, {pred}{axis}{noise}"


def _reads(schedule: Any, i: int) -> str:
    """Nodes and everything that is not the plain rule."""
    step = schedule.steps[i]
    if step.eval.source == "none":
        return ""
    stencil = schedule.stencil(i)
    notes = [f"from {stencil.start}"] if stencil.start != i else []
    full = max((nodes for nodes, _ in stencil.derivatives), key=len, default=())
    if full:
        notes.append(f"nodes {', '.join(map(str, (stencil.start, *full)))}")
    for k, (nodes, relax) in enumerate(stencil.derivatives, start=1):
        own = [] if nodes == full else [f"from node {', '.join(map(str, nodes))}"]
        if relax is not None:
            own.append(relax if isinstance(relax, str) else f"x (1 {relax:+.3g} h)")
        if own:
            notes.append(f"D{k} {' '.join(own)}")
    if step.eval.source != "model":
        notes.append(f"no evaluation: {step.eval.source}")
    if (step.eval.t_scale, step.eval.t_shift) != (1.0, 0.0):
        notes.append(f"told t = {_number(schedule.times[i] * step.eval.t_scale + step.eval.t_shift)}")
    if step.hist_shift:
        notes.append(f"history at rho = {1 + step.hist_shift:.3g}")
    if step.delta is not None:
        notes.append("learned additions")
    return "; ".join(notes)


def _corrector(step: Any) -> str:
    if step.corr is None:
        return ""
    return f"order {step.corr.order}{', evaluates again' if step.corr.reeval else ''}"


def _print_steps(steps: list[Step]) -> None:
    same = all(step.time == step.level for step in steps)  # EDM's time is the level
    columns = (
        ["level", "rule", "reads", "corrector", "update"] if same else ["time", "level", "rule", "reads", "corrector", "update"]
    )
    columns = [name for name in columns if any(getattr(step, name) for step in steps)]
    table = Table("step", *("t" if name == "time" else name for name in columns))
    for i, step in enumerate(steps):
        table.add_row(str(i), *(getattr(step, name) for name in columns))
    out_console.print(table)


def _print_both(names: Any, schedules: list[Any], steps: list[list[Step]], tableaus: list[Any]) -> None:
    """Both tables in one; what differs is marked."""
    columns = [name for name in ("level", "rule", "corrector", "update") if any(getattr(s, name) for own in steps for s in own)]
    table = Table("step", *(f"{name} {letter}" for name in columns for letter in "AB"))
    for i in range(max(map(len, steps))):
        a, b = (own[i] if i < len(own) else None for own in steps)
        cells = [str(i)]
        for part in columns:
            pair = ["-" if step is None else getattr(step, part) for step in (a, b)]
            cells += [f"[bold]{text}[/bold]" if pair[0] != pair[1] and text else text for text in pair]
        table.add_row(*cells)
    out_console.print(f"A is {names[0]}, B is {names[1]}; bold where they differ")
    out_console.print(table)
    out_console.print(_verdict(schedules, tableaus))


def _verdict(schedules: list[Any], tableaus: list[Any]) -> str:
    """Whether the two are the same solver, and how far apart they are."""
    from ..evaluation import answer_weights

    if len(schedules[0].steps) != len(schedules[1].steps) or schedules[0].nfe != schedules[1].nfe:
        return f"NFE {schedules[0].nfe} and {schedules[1].nfe}, {len(schedules[0].steps)} and {len(schedules[1].steps)} steps"
    apart = max(abs(a - b) for a, b in zip(schedules[0].times, schedules[1].times, strict=True))
    (first, _), (second, _) = (answer_weights(tableau) for tableau in tableaus)
    largest = float((first - second).abs().max())
    if apart < EQUAL and largest < EQUAL:
        return f"the same solver: no time differs and no weight of an answer by more than {largest:.1e}"
    return f"times differ by up to {apart:.3g}, weights of the network's answers by up to {largest:.3g}"

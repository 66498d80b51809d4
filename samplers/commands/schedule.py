"""``fewstep schedule``: look at, check and list solver schedules."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .common import JsonOption, SamplerArgument, out_console

app = typer.Typer(help="Look at, check and list solver schedules.", no_args_is_help=True)

NoiseOption = Annotated[
    str, typer.Option("--noise", help="Noise schedule: vp_linear, vp_cosine, sd, ddpm, edm, flow or flow:SHIFT.")
]


def _noise_named(name: str) -> Any:
    from .. import NoiseSchedule

    kind, _, value = name.partition(":")
    ddpm = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    latent = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    known: dict[str, Callable[[], Any]] = {
        "vp_linear": NoiseSchedule.vp_linear,
        "vp_cosine": NoiseSchedule.vp_cosine,
        "ddpm": lambda: NoiseSchedule.from_config(ddpm),
        "sd": lambda: NoiseSchedule.from_config(latent),
        "edm": NoiseSchedule.edm,
        "flow": lambda: NoiseSchedule.flow(float(value or 1.0)),
    }
    if kind not in known:
        raise ValueError(f"unknown noise schedule {name!r}; known: {', '.join(known)}")
    return known[kind]()


def _schedule_of(sampler: str, noise: Any, nfe: int | None) -> Any:
    """Recipe text with --nfe, or a fixed schedule that agrees with it."""
    from .. import SolverSchedule, recipe
    from ..recipes import canonical

    if canonical(sampler) is not None:
        if nfe is None:
            raise ValueError(f"recipe {sampler!r} needs --nfe")
        return recipe(sampler, noise, nfe)
    schedule = SolverSchedule.load(sampler)
    if nfe not in (None, schedule.nfe):
        raise ValueError(f"{sampler} has {schedule.nfe} network evaluations, --nfe asks for {nfe}")
    return schedule


@app.command("show")
def show_schedule(
    sampler: SamplerArgument,
    nfe: Annotated[int | None, typer.Option(min=1, help="Network evaluations (recipes).")] = None,
    noise: NoiseOption = "sd",
    plot: Annotated[Path | None, typer.Option(help="Also draw it into this PNG.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show a schedule step by step."""
    from .. import Tableau

    levels = _noise_named(noise)
    schedule = _schedule_of(sampler, levels, nfe)
    tableau = Tableau.build(schedule, levels, first_x0=_placeholder(schedule))
    if plot is not None:
        from ..evaluation import schedule_figure

        schedule_figure([schedule], levels, plot)
    if as_json:
        typer.echo(json.dumps(schedule.to_dict()))
        return
    rows = [row for stage in tableau.stages for row in stage.rows]
    by_end = {row.target: row for row in (*tableau.opening, *rows)}
    title = f"{schedule.name or sampler}: NFE {schedule.nfe}"
    table = Table("step", "t", "to", "order", "pred", "corrector", "update", title=title)
    for i, step in enumerate(schedule.steps):
        source = "" if step.eval.source == "model" else f" ({step.eval.source})"
        corrector = "" if step.corr is None else f"order {step.corr.order}"
        update = " ".join(f"{c:+.4g} {name}" for name, c in by_end[f"x{i + 1}"].terms)
        cells = (str(i), f"{schedule.times[i]:.5g}", f"{schedule.times[i + 1]:.5g}", f"{step.order}{source}", str(step.pred))
        table.add_row(*cells, corrector, f"x{i + 1} = {update}")
    out_console.print(table)
    out_console.print("x: states, c: corrected states, d: x0-predictions, by node number")


def _placeholder(schedule: Any) -> Any:
    """Stands in for the data's mean: the coefficients do not depend on it."""
    import torch

    return torch.zeros(1) if schedule.steps[0].eval.source == "average_x0" else None


@app.command("validate")
def validate_schedule(
    sampler: SamplerArgument,
    nfe: Annotated[int | None, typer.Option(min=1, help="Network evaluations (recipes).")] = None,
    noise: NoiseOption = "sd",
) -> None:
    """Check a schedule file or recipe: structure, placement of every step, and finite coefficients."""
    from .. import Tableau

    levels = _noise_named(noise)
    schedule = _schedule_of(sampler, levels, nfe)
    Tableau.build(schedule, levels, first_x0=_placeholder(schedule))
    steps, nfe_of, digest = len(schedule.steps), schedule.nfe, schedule.digest
    out_console.print(f"{sampler}: valid, {steps} steps, {nfe_of} network evaluations, digest {digest}")


@app.command("list")
def list_schedules(as_json: JsonOption = False) -> None:
    """List recipes with their options, and the schedules that ship."""
    from .. import RECIPES, SolverSchedule, shipped_schedules
    from ..recipes import ALIASES

    shipped = {name: SolverSchedule.load(path).nfe for name, path in sorted(shipped_schedules().items())}
    if as_json:
        recipes = {r.name: {"options": r.defaults, "summary": r.summary} for r in RECIPES.values()}
        typer.echo(json.dumps({"recipes": recipes, "aliases": ALIASES, "schedules": shipped}))
        return
    table = Table("recipe", "options", "what it is")
    for r in RECIPES.values():
        table.add_row(r.name, ", ".join(f"{k}={v}" for k, v in r.defaults.items()), r.summary)
    for alias, text in ALIASES.items():
        table.add_row(alias, "", f"= {text}")
    for name, count in shipped.items():
        table.add_row(name, f"NFE {count}", "schedule that ships")
    out_console.print(table)

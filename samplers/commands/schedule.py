"""``fewstep schedule``: look at, check and list solver schedules."""

from __future__ import annotations

import json

import typer
from rich.table import Table

from .common import JsonOption, SamplerArgument, out_console
from .schedule_convert import convert_schedule
from .schedule_inputs import NfeOption, NoiseOption, StatisticsOption, compiled, inputs
from .schedule_show import show_schedule

app = typer.Typer(help="Look at, check and list solver schedules.", no_args_is_help=True)

app.command("show")(show_schedule)
app.command("convert")(convert_schedule)


@app.command("validate")
def validate_schedule(
    sampler: SamplerArgument,
    nfe: NfeOption = None,
    noise: NoiseOption = None,
    statistics: StatisticsOption = None,
) -> None:
    """Check a schedule file or recipe: structure, placement of every step, and finite coefficients."""
    schedule, levels = inputs(sampler, noise, nfe)
    compiled(schedule, levels, statistics)
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

"""``fewstep schedule convert``: other people's schedule files become ours."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from .common import out_console
from .schedule_inputs import NoiseOption, noise_named

FORMATS = ("usf",)


def convert_schedule(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="The file to convert; no code in it is run.")],
    out: Annotated[Path, typer.Option("--out", help="Our JSON.")],
    form: Annotated[str, typer.Option("--from", help=f"What the file is: {', '.join(FORMATS)}.")] = "usf",
    noise: NoiseOption = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the schedule; default: the file's.")] = None,
) -> None:
    """Convert a published schedule file to a JSON solver schedule that gives the same samples, bit for bit."""
    import torch

    from ..peers import load_usf
    from ..step import STATISTICAL

    if form not in FORMATS:
        raise ValueError(f"unknown format {form!r}; known: {', '.join(FORMATS)}")
    schedule = load_usf(source)
    changes: dict[str, object] = {"name": name or source.stem}
    if noise is not None:
        levels = noise_named(noise)
        levels.clamp(torch.tensor(schedule.times, dtype=torch.float64))  # refuses times that are outside
        changes["path"] = {"type": levels.kind, **levels.parameters}
    schedule = msgspec.structs.replace(schedule, **changes)
    schedule.save(out)
    facts = [f"{len(schedule.steps)} steps", f"{schedule.nfe} network evaluations", f"digest {schedule.digest}"]
    if schedule.analytic_first_step:
        facts.append(f"analytic first step ({schedule.steps[0].eval.source})")
    if any(step.pred in STATISTICAL for step in schedule.steps):
        facts.append("needs empirical model statistics")
    if schedule.provenance.get("skip_coefficients"):
        facts.append("comes with U-Net skip factors, which edit the network and are applied apart")
    out_console.print(f"{out}: {', '.join(facts)}", soft_wrap=True)

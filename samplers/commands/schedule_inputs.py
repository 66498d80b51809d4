"""What the ``fewstep schedule`` commands are given: a noise schedule by name, and a sampler that becomes a solver schedule."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

NoiseOption = Annotated[
    str | None,
    typer.Option(
        "--noise",
        help="Noise schedule: vp_linear, vp_cosine, sd, ddpm, edm, flow or flow:SHIFT. Default: the file's own, else sd.",
    ),
]
NfeOption = Annotated[int | None, typer.Option(min=1, help="Network evaluations (recipes).")]
StatisticsOption = Annotated[
    Path | None, typer.Option("--statistics", help="Empirical model statistics, for steps that use them.")
]


def noise_named(name: str) -> Any:
    """The noise schedule called ``name``.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
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


def noise_of(schedule: Any) -> Any:
    """The noise schedule that a file says its times belong to; "sd" where it says none or names a table of alphas."""
    from .. import NoiseSchedule

    path = dict(schedule.path or {})
    makers = {"vp_linear": NoiseSchedule.vp_linear, "vp_cosine": NoiseSchedule.vp_cosine}
    makers |= {"edm": NoiseSchedule.edm, "flow": NoiseSchedule.flow}
    maker = makers.get(path.pop("type", ""))
    return noise_named("sd") if maker is None else maker(**path)


def inputs(sampler: str, noise: str | None, nfe: int | None) -> tuple[Any, Any]:
    """A solver schedule and its noise schedule, from recipe text with an NFE or from a fixed schedule that agrees with it.

    Raises:
        ValueError: a recipe without NFE, or a fixed schedule with another one.
        FileNotFoundError: neither a recipe, a file nor a shipped name.
    """
    from .. import SolverSchedule, recipe
    from ..recipes import canonical

    if canonical(sampler) is not None:
        if nfe is None:
            raise ValueError(f"recipe {sampler!r} needs --nfe")
        levels = noise_named(noise or "sd")
        return recipe(sampler, levels, nfe), levels
    schedule = SolverSchedule.load(sampler)
    if nfe not in (None, schedule.nfe):
        raise ValueError(f"{sampler} has {schedule.nfe} network evaluations, --nfe asks for {nfe}")
    return schedule, noise_of(schedule) if noise is None else noise_named(noise)


def compiled(schedule: Any, levels: Any, statistics: Path | None = None) -> Any:
    """The tableau; a data mean that an analytic first step needs is stood in for, as no coefficient depends on it.

    Raises:
        ValueError: the schedule does not compile for this noise schedule.
    """
    import torch

    from .. import Tableau

    mean = torch.zeros(1) if schedule.steps[0].eval.source == "average_x0" else None
    if statistics is None:
        return Tableau.build(schedule, levels, first_x0=mean)
    from ..statistics import EmpiricalStatistics

    return Tableau.build(schedule, levels, first_x0=mean, statistics=EmpiricalStatistics.load(statistics))

"""Boost-and-Skip in a pipeline: wider starting noise, and the first steps left out."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..config_reader import read_config
from ..denoisers import network_of
from ..noise import NoiseSchedule
from ..tableau import Tableau
from .boosting import boost_gain, level_of_gain, model_top_variance
from .hooks import NetworkInputs, patched_forward
from .levels import alpha_bar

# In-tree schedulers that draw noise in every step; those in the second list only with an "sde" algorithm.
_ANCESTRAL = (
    "DDPMScheduler", "DDPMParallelScheduler", "EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
    "DPMSolverSDEScheduler", "SASolverScheduler",
)  # fmt: skip
_ANCESTRAL_BY_ALGORITHM = ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "CosineDPMSolverMultistepScheduler")


@dataclass
class BoostRun:
    """What Boost-and-Skip did in the latest run inside its block.

    Attributes:
        skipped: steps left out; the pipeline made that many evaluations fewer than it was asked for.
        level: share of signal alpha_bar at the start.
        gain: output variance over data variance along the leading direction, as predicted; None without a top variance.
    """

    skipped: int = 0
    level: float | None = None
    gain: float | None = None


@contextmanager
def boost_and_skip(
    pipe: Any,
    gamma: float = 4.0,
    gain: float | None = None,
    *,
    skip: int | None = None,
    top_variance: float | None = None,
    force: bool = False,
) -> Iterator[BoostRun]:
    r"""Start ``pipe`` from noise of standard deviation ``gamma``, some steps in (Um et al. 2025, arXiv:2502.06516).

    Rare samples come from widened leading directions; no gradients, no classifier. How many steps to skip follows from the gain
    $G(\lambda_1) = 1 + \bar\alpha\lambda_1(\gamma^2 - v)/v^2$ (see `samplers.guidance.boosting`), or is given.

    Args:
        pipe: a diffusers pipeline with a stochastic scheduler.
        gamma: standard deviation of the starting noise, > 1 with ``gain``, > 0 with ``skip``.
        gain: output variance over data variance along the leading direction; 1.5 to 4 is useful. 2.5 when neither this nor
            ``skip`` is given.
        skip: number of steps to leave out, instead of ``gain``.
        top_variance: the data's largest variance along one direction, in the state's units (`top_eigenvalue`); read from the
            model when None, for pipelines without a prompt.
        force: also run with an ODE sampler, which only scales the starting noise up into every direction.

    Yields:
        Counts, filled when the pipeline runs.

    Raises:
        ValueError: a deterministic scheduler without ``force``; gain and skip together or out of range; a missing
            ``top_variance`` that cannot be read from the model.
    """
    scheduler, network = pipe.scheduler, network_of(pipe)
    _check(scheduler, gamma, gain, skip, force)
    wanted = None
    if skip is None:
        top_variance = _top_variance(pipe) if top_variance is None else top_variance
        wanted = level_of_gain(2.5 if gain is None else gain, top_variance, gamma)
    noise, run, due = read_config(scheduler.config).noise_schedule(), BoostRun(), [False]
    set_timesteps, step, forward = scheduler.set_timesteps, scheduler.step, network.forward

    @functools.wraps(set_timesteps)
    def skipping(*args: Any, **kwargs: Any) -> None:
        set_timesteps(*args, **kwargs)
        levels = [_level(noise, n) for n in scheduler.timesteps.tolist()]
        count = skip if wanted is None else _nearest(levels, wanted)
        if count >= len(levels):
            raise ValueError(f"{count} steps cannot be skipped of {len(levels)}")
        _leave_out(scheduler, count)
        run.skipped, run.level = count, levels[count]
        run.gain = None if top_variance is None else boost_gain(levels[count], top_variance, gamma)
        due[0] = True

    @functools.wraps(step)
    def first_boosted(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        if due[0]:
            due[0], sample = False, sample * gamma
        return step(model_output, timestep, sample, *args, **kwargs)

    @functools.wraps(forward)
    def boosted(*args: Any, **kwargs: Any) -> Any:
        if pipe.scheduler is not scheduler:
            raise ValueError("Boost-and-Skip works on the scheduler: change the scheduler outside the block, not inside")
        if not due[0]:
            return forward(*args, **kwargs)
        inputs = NetworkInputs.of(args, kwargs)
        return replace(inputs, state=inputs.state * gamma).call(forward)

    scheduler.set_timesteps, scheduler.step = skipping, first_boosted
    try:
        with patched_forward(network, boosted):
            yield run
    finally:
        del scheduler.set_timesteps, scheduler.step


def _check(scheduler: Any, gamma: float, gain: float | None, skip: int | None, force: bool) -> None:
    if gain is not None and skip is not None:
        raise ValueError("give gain or skip, not both")
    if not gamma > 0 or (skip is not None and (isinstance(skip, bool) or not isinstance(skip, int) or skip < 0)):
        raise ValueError(f"gamma must be positive and skip a whole number of at least 0, got {gamma} and {skip}")
    if not (force or _stochastic(scheduler)):
        raise ValueError(
            f"{_named(scheduler)} draws no noise: Boost-and-Skip would widen every direction, not the leading ones; use a "
            "stochastic sampler (swap(pipe, 'ddpm'), 'euler_ancestral', 'sa_solver'), or force=True"
        )
    if getattr(scheduler, "analytic_first_step", False):
        raise ValueError("Boost-and-Skip leaves the first steps out, so a schedule with an analytic first step has no use here")


def _level(noise: NoiseSchedule, timestep: float) -> float:
    """The share of signal at a timestep."""
    alpha, sigma = noise.alpha_sigma(noise.clamp(noise.t_of_timestep(timestep)))
    return alpha_bar(alpha.item(), sigma.item())


def _named(scheduler: Any) -> str:
    schedule = getattr(scheduler.config, "schedule", None)
    return f"{type(scheduler).__name__} ({schedule})" if isinstance(schedule, str) else type(scheduler).__name__


def _stochastic(scheduler: Any) -> bool:
    name = type(scheduler).__name__
    if name == "SolverScheduler":
        source = scheduler.source
        schedule = source if hasattr(source, "stochastic") else source.schedule(scheduler.noise_schedule, 8)
        return bool(schedule.stochastic)
    if name in _ANCESTRAL_BY_ALGORITHM:
        return str(scheduler.config.get("algorithm_type", "sde")).startswith("sde")
    return name in _ANCESTRAL


def _nearest(levels: list[float], wanted: float) -> int:
    """The entry whose signal-to-noise ratio is nearest, in logarithms."""
    odds = torch.logit(torch.tensor([*levels, wanted], dtype=torch.float64))
    return int((odds[:-1] - odds[-1]).abs().argmin())


def _leave_out(scheduler: Any, count: int) -> None:
    """Make the scheduler begin ``count`` entries later, as if it had been built so."""
    if count == 0:
        return
    if type(scheduler).__name__ == "SolverScheduler":
        schedule = scheduler.solver_schedule.tail(scheduler.tableau.stages[count].query.node)
        scheduler.solver_schedule = schedule
        scheduler.tableau = Tableau.build(schedule, scheduler.noise_schedule)
        scheduler.num_inference_steps = len(scheduler.tableau.stages)
    scheduler.timesteps = scheduler.timesteps[count:]
    if getattr(scheduler, "sigmas", None) is not None:
        scheduler.sigmas = scheduler.sigmas[count:]


def _top_variance(pipe: Any) -> float:
    from ..denoisers import from_pipeline

    accepted = inspect.signature(pipe.__call__).parameters
    if "prompt" in accepted:
        raise ValueError(f"{type(pipe).__name__} needs top_variance= (see top_eigenvalue), or skip= instead of gain")
    labels = {"class_labels": list(range(4))} if "class_labels" in accepted else {}
    labels |= {"guidance_scale": 1.0} if "guidance_scale" in accepted else {}
    denoiser, _, shape = from_pipeline(pipe, **labels)
    network = network_of(pipe)
    noise = read_config(pipe.scheduler.config).noise_schedule()
    generator = torch.Generator().manual_seed(0)
    return model_top_variance(denoiser, noise, shape, generator=generator, device=next(network.parameters()).device)

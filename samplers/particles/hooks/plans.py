"""What a scheduler's run looks like to a corrector: its noise levels, where it draws noise, and whether that is exact."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import NoiseSchedule
from ...parametrization import FLOW_PREDICTION
from ...schedulers import SolverScheduler
from ...tableau import Tableau
from ..path import Level

ADVICE = 'use one that does, as in `with samplers.schedulers.swap(pipe, "euler_ancestral"): ...`'
EXACT = ("EulerAncestralDiscreteScheduler", "DDPMScheduler", "DDIMScheduler")
FRESH = ("LCMScheduler", "TCDScheduler", "FlowMatchEulerDiscreteScheduler")  # remember nothing, and draw noise of their own


@dataclass(frozen=True)
class Plan:
    """One run of a scheduler.

    Attributes:
        levels: where the network is evaluated, and where the run ends; one more than there are evaluations.
        noisy: per evaluation, whether the move after it draws noise: copies that resampling makes separate at once.
        prediction_type: of the network.
        sigma_data: EDM preconditioning, or None.
        scaled: whether the latents are x / alpha (variance exploding coordinates of a variance preserving model).
        clip: bound that the scheduler puts on x0, or None.
        reverse_sde: whether every step's noise is that of the reverse SDE (multiplier 1).
    """

    levels: list[Level]
    noisy: list[bool]
    prediction_type: str
    sigma_data: float | None
    scaled: bool
    clip: float | None
    reverse_sde: bool


def check_scheduler(scheduler: Any, *, exact: bool, resamples: bool, eta: float | None) -> None:
    """Refuse, before any compute, schedulers whose steps are not a reverse diffusion that a corrector can weigh.

    Args:
        scheduler: the pipeline's.
        exact: whether weights of branches are at stake; a reward alone corrects any sampler's own law.
        resamples: whether particles may be duplicated.
        eta: the call's, where the pipeline takes one.

    Raises:
        ValueError: with the reason and what to use instead.
    """
    name, config = type(scheduler).__name__, scheduler.config
    solver = isinstance(scheduler, SolverScheduler)
    if exact and config.get("thresholding") and (not solver or "thresholding" in _honours(scheduler)):
        raise ValueError(
            "dynamic thresholding rescales every prediction by its own quantile, which no law describes; set thresholding=False"
        )
    if solver:
        return  # its steps are read once they are chosen, see `plan_of`
    if name in FRESH and not exact:
        if resamples and (eta == 0.0 if name == "TCDScheduler" else config.get("stochastic_sampling") is False):
            raise ValueError(
                f"{name} without noise is an ODE: copies made by resampling would never separate. Set "
                f"{'eta > 0' if name == 'TCDScheduler' else 'stochastic_sampling=True'} or resample_window=(0, 0)"
            )
        return
    if name not in EXACT:
        raise ValueError(f"{name} does not draw the noise of a reverse diffusion, which corrected particles need; {ADVICE}")
    if name == "DDIMScheduler" and not eta and resamples:
        raise ValueError(
            "DDIM without noise is an ODE: copies made by resampling would never separate. Call the pipeline with eta > 0 "
            'where it takes one, use `with samplers.schedulers.swap(pipe, "ddim:eta=1"): ...`, or set resample_window=(0, 0)'
        )
    if exact and name == "DDPMScheduler" and config.variance_type not in ("fixed_small", "fixed_small_log"):
        raise ValueError(
            f"DDPM with variance_type {config.variance_type!r} draws more noise than its drift allows for; set "
            'variance_type="fixed_small"'
        )


def plan_of(scheduler: Any, *, exact: bool, resamples: bool, eta: float | None) -> Plan:
    """The run that ``set_timesteps`` has chosen.

    Raises:
        ValueError: as in `check_scheduler`, for what the chosen steps show.
    """
    if isinstance(scheduler, SolverScheduler):
        return _of_solver(scheduler, exact=exact, resamples=resamples)
    config, name = scheduler.config, type(scheduler).__name__
    noise_schedule = NoiseSchedule.from_config(config)
    timesteps = scheduler.timesteps.detach().cpu().double()
    times = noise_schedule.t_of_timestep(timesteps)
    if name == "FlowMatchEulerDiscreteScheduler":
        sigma = scheduler.sigmas.detach().cpu().double()
        alpha = 1.0 - sigma
    elif name == "EulerAncestralDiscreteScheduler":
        ratios = scheduler.sigmas.detach().cpu().double()
        alpha = torch.rsqrt(1.0 + ratios.square())
        sigma = ratios * alpha
    else:
        final = torch.ones(1, dtype=torch.float64)
        if name != "DDPMScheduler":
            final = scheduler.final_alpha_cumprod.double().reshape(1)
        kept = torch.cat([scheduler.alphas_cumprod.double()[timesteps.long()], final])
        alpha, sigma = kept.sqrt(), (1.0 - kept).clamp(min=0.0).sqrt()
    ends = torch.cat([times, torch.zeros(1, dtype=torch.float64)])
    levels = [Level(t, a, s) for t, a, s in zip(ends, alpha.tolist(), sigma.tolist(), strict=True)]
    steps = len(timesteps)
    draws = eta is None or eta > 0 if name in ("DDIMScheduler", "TCDScheduler") else config.get("stochastic_sampling", True)
    clips = bool(config.get("clip_sample")) and name not in ("EulerAncestralDiscreteScheduler", "TCDScheduler")
    return Plan(
        levels,
        [draws and i < steps - 1 for i in range(steps)],
        config.get("prediction_type", FLOW_PREDICTION),
        None,
        name == "EulerAncestralDiscreteScheduler",
        float(config.clip_sample_range) if clips else None,
        name not in ("DDIMScheduler", *FRESH) or eta == 1.0,
    )


def _of_solver(scheduler: SolverScheduler, *, exact: bool, resamples: bool) -> Plan:
    """A solver schedule takes part through the noise of its steps."""
    tableau, schedule = scheduler.tableau, scheduler.solver_schedule
    assert tableau is not None
    assert schedule is not None
    if schedule.steps[0].eval.source not in ("model", "none"):
        raise ValueError("a schedule with an analytic first step does not start from noise the weights know; choose another")
    ends = torch.tensor([schedule.times[0], schedule.times[-1]], dtype=torch.float64)
    alpha, sigma = scheduler.noise_schedule.alpha_sigma(ends)
    for i, step in enumerate(schedule.steps if exact else ()):
        if step.noise is None or (step.noise.kind != "fresh" and step.noise.scale == 1.0):
            continue
        if step.noise.kind == "fresh" or not noise_matches_drift(tableau, float(sigma[0])):
            raise ValueError(
                f"steps[{i}] draws noise that its drift does not match ({step.noise.kind}, scale {step.noise.scale:g}): no "
                f"weight can correct that; {ADVICE}"
            )
        break
    queries = [stage.query for stage in tableau.stages]
    levels = [Level(q.t, float(q.alpha), float(q.sigma)) for q in queries]
    levels.append(Level(ends[1], float(alpha[1]), float(sigma[1])))
    draws = [any(torch.is_tensor(row.noise) or row.noise != 0.0 for row in stage.rows) for stage in tableau.stages]
    if resamples and len(draws) > 1 and not any(draws):
        raise ValueError(
            "this solver schedule is an ODE: copies made by resampling would never separate; choose a stochastic one, such as "
            '"euler_ancestral" or "ddim:eta=1", or set resample_window=(0, 0)'
        )
    steps = [step for step in schedule.steps if step.eval.source == "model"]
    reverse = all(step.noise is not None and step.noise.amount == 1.0 and step.noise.kind != "fresh" for step in steps)
    clip, config = None, scheduler.config
    if isinstance(tableau.clip, float):
        clip = tableau.clip
    elif tableau.clip == "config" and config.clip_sample and not isinstance(config.schedule, dict):
        clip = float(config.clip_sample_range) if "clip_sample" in _honours(scheduler) else None
    model = scheduler.model_config
    return Plan(levels, draws, model.prediction_type, model.sigma_data, False, clip, reverse)


def _honours(scheduler: SolverScheduler) -> tuple[str, ...]:
    """The treatments of x0 in the scheduler's config that its recipe applies."""
    return getattr(getattr(scheduler.source, "recipe", None), "honours", ())


def noise_matches_drift(tableau: Tableau, start: float) -> bool:
    """Whether every evaluated state has the noise of its level, where the data is a point at 0 and the start has std ``start``.

    What a step draws may have any scale then: DPM-Solver++ SDE draws less at a step's end, since it takes over what it drew at
    the middle. Followed as coefficients of the independent draws, so draws that share a part are counted right.
    """
    draws = 1
    memory: dict[str, list[float]] = {"x0": [start]}
    rows = list(tableau.opening)
    for stage in (*tableau.stages, None):
        for row in rows:
            parts = [(float(c), memory.get(name, [])) for name, c in row.terms]  # a prediction of 0 adds nothing
            found = [sum(c * part[j] for c, part in parts if j < len(part)) for j in range(draws)]
            if float(row.noise) != 0.0:
                found, draws = [*found, float(row.noise)], draws + 1
            memory[row.target] = found
        if stage is not None:
            level = math.hypot(*memory[stage.query.state])
            if abs(level - float(stage.query.sigma)) > 1e-6 * start:
                return False
            rows = list(stage.rows)
    return True


def permute(scheduler: Any, index: Tensor) -> None:
    """Let what a scheduler remembers of its samples follow ``index``; the exact ones of diffusers remember nothing."""
    if isinstance(scheduler, SolverScheduler):
        scheduler.select(index)

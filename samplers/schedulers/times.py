"""Which solver schedule a `set_timesteps` call means: a fixed one, or a recipe on the config's or the caller's times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import torch
from torch import Tensor

from ..noise import NoiseSchedule
from ..recipes import RecipeText
from ..strategy import Noise, SolverSchedule
from .spacing import config_times, dynamic_shift, end_time, flow_times

ROUNDING = 1e-3  # relative; published lists of noise levels have few digits


def schedule_for(
    source: RecipeText | SolverSchedule,
    config: Mapping[str, Any],
    noise: NoiseSchedule,
    *,
    num_inference_steps: int | None,
    timesteps: Sequence[float] | None,
    sigmas: Sequence[float] | None,
    mu: float | None,
) -> SolverSchedule:
    """The solver schedule for one call; arguments as in `SolverScheduler.set_timesteps`."""
    nfe, given = _asked_for(num_inference_steps, timesteps, sigmas)
    if isinstance(source, SolverSchedule):
        if nfe != source.nfe:
            raise ValueError(
                f"the schedule {source.name or 'in use'} has {source.nfe} network evaluations; "
                f"num_inference_steps={nfe} was asked for: pass {source.nfe}, or use a recipe"
            )
        return source
    if source.names_grid:
        if config.get("use_dynamic_shifting") and mu is not None:
            noise = NoiseSchedule.flow(dynamic_shift(config, mu))
        return source.schedule(noise, nfe)
    n, convention = source.macro_steps(noise, nfe), source.recipe.spacing
    final = str(source.common["final"]) if "final" in source.given or source.recipe.final is not None else None
    if source.common["shift"] is not None:
        config = {**config, "shift": source.common["shift"]}
    if given is None:
        at = config_times(noise, config, n, convention=convention, final=final, mu=mu)
    else:
        at = _callers_times(noise, config, _resampled(given, n), timesteps is not None, convention, final, mu)
    return source.schedule(noise, nfe, at=at)


def published_levels(noise: NoiseSchedule, t: Tensor, *, reversed_flow: bool) -> Tensor:
    """Noise levels at times ``t`` as in-tree schedulers publish them: sigma for flow and EDM, sigma / alpha for VP."""
    alpha, sigma = noise.alpha_sigma(t)
    if noise.family == "vp":
        return sigma / alpha
    return alpha if reversed_flow else sigma


def place_of(timestep: float | Tensor, grid: Tensor) -> int:
    """Index of a timestep in ``grid`` (N,); the second where it occurs twice, the last where it does not occur."""
    value = timestep.to(grid) if torch.is_tensor(timestep) else torch.tensor(timestep, dtype=grid.dtype, device=grid.device)
    found = (grid == value).nonzero().flatten().tolist()
    return int(found[1] if len(found) > 1 else found[0] if found else len(grid) - 1)


def with_ddim_arguments(schedule: SolverSchedule, eta: float, use_clipped_model_output: bool) -> SolverSchedule:
    """A DDIM schedule with the noise and the treatment of clipped predictions that pipelines pass to `SolverScheduler.step`.

    Raises:
        ValueError: eta outside [0, 1].
    """
    noise = Noise(kind="eta", amount=float(eta)) if eta else None
    keep = not use_clipped_model_output
    steps = tuple(msgspec.structs.replace(step, noise=noise, keep_eps=keep) for step in schedule.steps)
    return msgspec.structs.replace(schedule, steps=steps)


def _asked_for(
    num_inference_steps: int | None, timesteps: Sequence[float] | None, sigmas: Sequence[float] | None
) -> tuple[int, list[float] | None]:
    """The number of evaluations, and the caller's own times if any (without a last sigma of 0)."""
    if timesteps is not None and sigmas is not None:
        raise ValueError("pass timesteps or sigmas, not both")
    own = timesteps if timesteps is not None else sigmas
    given = None if own is None else [float(value) for value in own]
    if given and sigmas is not None and len(given) > 1 and given[-1] == 0.0:
        given = given[:-1]
    nfe = num_inference_steps if given is None else len(given)
    if nfe is None:
        raise ValueError("set_timesteps needs num_inference_steps, timesteps or sigmas")
    if nfe < 1 or nfe != int(nfe):
        raise ValueError(f"num_inference_steps must be a whole number of at least 1, got {nfe}")
    nfe = int(nfe)
    if given is not None and num_inference_steps not in (None, nfe):
        raise ValueError(f"num_inference_steps is {num_inference_steps}, but {nfe} times were given")
    return nfe, given


def _resampled(values: list[float], n: int) -> list[float]:
    """The caller's values at n places, for rules whose steps are not one per evaluation (Heun, analytic first step)."""
    if n == len(values):
        return values
    if len(values) == 1:
        raise ValueError(f"this schedule has {n} steps of its own in one evaluation; give no times, or more evaluations")
    place = torch.linspace(0, len(values) - 1, n, dtype=torch.float64)
    left = place.floor().long().clamp(max=len(values) - 2)
    points = torch.tensor(values, dtype=torch.float64)
    return (points[left] + (place - left) * (points[left + 1] - points[left])).tolist()


def _callers_times(
    noise: NoiseSchedule,
    config: Mapping[str, Any],
    values: list[float],
    are_timesteps: bool,
    convention: str,
    final: str | None,
    mu: float | None,
) -> tuple[float, ...]:
    if noise.family == "flow":
        unshifted = [value / 1000.0 for value in values] if are_timesteps else values
        return (*flow_times(config, len(values), mu, unshifted).tolist(), 0.0)
    levels = torch.tensor(values, dtype=torch.float64)
    top = float(torch.exp(-noise.lam(noise.t_max)))
    if not are_timesteps and noise.family == "vp" and values[0] > top * (1 + ROUNDING):
        raise ValueError(f"sigmas begin at {values[0]:g}, above the {top:g} of this model's first training step")
    t = noise.t_of_timestep(levels) if are_timesteps else noise.t_of_lam(-torch.log(levels))
    return (*t.tolist(), end_time(noise, config, float(t[-1]), convention=convention, final=final))

"""First-order recipes: one network answer per step, no history; with and without fresh noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..noise import NoiseSchedule
from ..strategy import Evaluation, Noise, StepStrategy
from .grids import TimeGrid


def ddim(grid: TimeGrid, *, eta: float = 0.0) -> tuple[StepStrategy, ...]:
    """DDIM (Song et al. 2021, arXiv:2010.02502, eq. 12): the exact step for a constant x0-prediction.

    Order 1, one NFE a step. When x0 is clipped, the noise prediction is the unclipped one, as in diffusers.

    Args:
        grid: the times.
        eta: 0 is deterministic, 1 ancestral sampling.
    """
    noise = Noise(kind="eta", amount=eta) if eta else None
    return (StepStrategy(order=1, keep_eps=True, noise=noise),) * grid.n


def euler(grid: TimeGrid) -> tuple[StepStrategy, ...]:
    r"""Euler in $\sigma/\alpha$ (Karras et al. 2022, arXiv:2206.00364, algorithm 1 without churn).

    Order 1, one NFE a step. The same step as DDIM; for flow models the Euler step of the velocity field.

    Args:
        grid: the times.
    """
    return (StepStrategy(order=1),) * grid.n


def euler_ancestral(grid: TimeGrid, *, eta: float = 1.0, s_noise: float = 1.0) -> tuple[StepStrategy, ...]:
    """Ancestral Euler (k-diffusion; the law of DDIM's eta, arXiv:2010.02502): Euler to a lower level, then noise up.

    Weak order 1, one NFE a step. The law of DDIM with the same eta.

    Args:
        grid: the times.
        eta: share of the ancestral noise, in [0, 1].
        s_noise: multiplies the noise.
    """
    noise = Noise(kind="eta", amount=eta, scale=s_noise) if eta else None
    return (StepStrategy(order=1, noise=noise),) * grid.n


def ddpm(grid: TimeGrid) -> tuple[StepStrategy, ...]:
    """DDPM (Ho et al. 2020, arXiv:2006.11239, eq. 6-7): the forward posterior for the predicted x0, small variance.

    Weak order 1, one NFE a step. DDIM with eta = 1, except that clipping x0 also changes the noise prediction.

    Args:
        grid: the times.
    """
    return (StepStrategy(order=1, noise=Noise(kind="eta", amount=1.0)),) * grid.n


def lcm(grid: TimeGrid) -> tuple[StepStrategy, ...]:
    """Consistency sampling (Song et al. 2023, arXiv:2303.01469, algorithm 1; LCM, arXiv:2310.04378).

    For distilled checkpoints: every step keeps only the predicted x0 and adds fresh noise. One NFE a step.

    Args:
        grid: the times.
    """
    return (StepStrategy(order=1, noise=Noise(kind="fresh")),) * grid.n


def tcd(grid: TimeGrid, *, eta: float = 0.3) -> tuple[StepStrategy, ...]:
    """Strategic stochastic sampling of TCD (Zheng et al. 2024, arXiv:2402.19159, algorithm 4).

    For distilled checkpoints: a DDIM step to a time cleaner than the next one, then the forward process back up to it. One
    NFE a step.

    Args:
        grid: the times, with the cleaner ones in between.
        eta: how far beyond: the share of the next time that is left out, in [0, 1).
    """
    back = StepStrategy(eval=Evaluation(source="none"))
    return tuple(StepStrategy(order=1) if grid.falls(i) else back for i in range(grid.n))


def tcd_expand(noise: NoiseSchedule, times: tuple[float, ...], nfe: int, options: Mapping[str, Any]) -> tuple[float, ...]:
    """Put the cleaner times between the evaluated ones; the last step goes straight to its end.

    Raises:
        ValueError: eta outside [0, 1).
    """
    eta = options["eta"]
    if not 0 <= eta < 1:
        raise ValueError(f"tcd: eta must be in [0, 1), got {eta}")
    out = [times[0]]
    for t in times[1:-1]:
        step = noise.timestep(t).item()
        beyond = noise.t_of_timestep(math.floor((1 - eta) * step)).item() if noise.kind == "vp_discrete" else (1 - eta) * t
        out += [beyond, t] if beyond < t else [t]
    return (*out, times[-1])

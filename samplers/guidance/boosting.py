r"""Boost-and-Skip (Um et al. 2025, arXiv:2502.06516): start from wider noise, some steps in. No gradients, no training.

Started from $N(0, \gamma^2 I)$ at a share of signal $\bar\alpha$, ancestral sampling multiplies the output variance of a data
direction of variance $\lambda$ by $G(\lambda) = 1 + \bar\alpha\lambda(\gamma^2 - v)/v^2$ with
$v = \bar\alpha\lambda + 1 - \bar\alpha$.
So only leading directions move, and only where $\bar\alpha\lambda$ is not small: the number of skipped steps must follow from
the gain and cannot be carried from one noise schedule to another.
"""

from __future__ import annotations

import math

import torch

from ..engine import Denoiser
from ..noise import NoiseSchedule
from .levels import time_of_alpha_bar


def boost_gain(level: float, variance: float, gamma: float) -> float:
    """How much wider a data direction comes out: output variance over data variance.

    Args:
        level: share of signal alpha_bar at the start, in (0, 1).
        variance: of the data in this direction.
        gamma: standard deviation of the starting noise (1: as trained).
    """
    v = level * variance + 1 - level
    return 1 + level * variance * (gamma**2 - v) / v**2


def level_of_gain(gain: float, variance: float, gamma: float) -> float:
    r"""The noisiest start, as a share of signal, whose gain in this direction is ``gain``.

    The gain rises with the share of signal up to $v = 2\gamma^2/(1+\gamma^2)$ or thereabouts and falls afterwards.

    Raises:
        ValueError: a gain of 1 or less, or above what this gamma reaches; the message names the highest.
    """
    if not gamma > 1:
        raise ValueError(f"gamma must be above 1 to widen anything, got {gamma}")
    if not gain > 1:
        raise ValueError(f"gain must be above 1, got {gain}")
    log_odds = torch.linspace(-14.0, 6.0, 20_001, dtype=torch.float64)
    levels = torch.sigmoid(log_odds)
    v = levels * variance + 1 - levels
    gains = 1 + levels * variance * (gamma**2 - v) / v**2
    reached = (gains >= gain).nonzero()
    if len(reached) == 0:
        raise ValueError(f"gain {gain:g} cannot be reached with gamma={gamma:g}: the highest is {gains.max().item():.3g}")
    return levels[reached[0, 0]].item()


def model_top_variance(
    denoiser: Denoiser,
    noise_schedule: NoiseSchedule,
    shape: tuple[int, ...],
    *,
    level: float = 0.02,
    steps: int = 12,
    batch: int = 4,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> float:
    r"""The data's largest variance along one direction, read from the denoiser without data.

    At high noise $\partial\hat x_0/\partial x_t = \alpha\lambda/(\alpha^2\lambda + \sigma^2)$ along a principal direction of
    Gaussian data: power iteration with finite differences on a batch of noises, then solved for $\lambda$. Takes
    ``2 * steps`` evaluations of ``batch`` samples.

    Args:
        denoiser: ``(x, t) -> x0``.
        noise_schedule: the denoiser's.
        shape: of one sample.
        level: share of signal at which it is read.
        steps: of the power iteration.
        batch: noises averaged over.
        generator: source of the noises.
        dtype: of the states.
        device: of the states.
    """
    t = time_of_alpha_bar(noise_schedule, level)
    alpha, sigma = (value.item() for value in noise_schedule.alpha_sigma(t))
    where = "cpu" if generator is None else generator.device
    x = sigma * torch.randn((batch, *shape), generator=generator, device=where).to(device, dtype)
    v = torch.randn((1, *shape), generator=generator, device=where).to(device, dtype)
    size, slope = sigma * math.sqrt(math.prod(shape)) * 0.05, 0.0
    with torch.no_grad():
        for _ in range(steps):
            v = v * (size / v.norm())
            change = (denoiser(x + v, t) - denoiser(x - v, t)).mean(0, keepdim=True) / 2
            slope, v = (change.norm() / size).item(), change
    if slope * alpha >= 1:
        raise ValueError("the denoiser's slope says the data's variance is unbounded; give top_variance=")
    return slope * sigma**2 / (alpha * (1 - slope * alpha))

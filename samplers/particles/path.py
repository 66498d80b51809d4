r"""The path of Feynman-Kac correctors: how a particle moves from one noise level to the next and what it weighs.

Everything is stated for $\tilde x = x / \alpha$ at noise $s = \sigma / \alpha$, where every noise schedule is variance
exploding: no drift of the data remains, so no divergence term either. With $\epsilon_i = (\tilde x - D_i) / s$,
$E = \sum_i g_i \epsilon_i$, $G = \sum_i g_i$ and the noise multiplier $\ell$ (Skreta et al. 2025, arXiv:2503.02819, for
$\ell = 1$; the rest is the same algebra):

    proposal   d x~ = -(1 + l^2)/2 E/s d(s^2) + l sqrt(d s^2) z          (s^2 decreasing)
    weight     d log w = 1/2 (|E|^2 - sum g_i |eps_i|^2) d log(s^2)      whatever l is

Only this pairing of drift and noise needs no Laplacian of log q.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..noise import NoiseSchedule


@dataclass(frozen=True)
class Level:
    """A noise level: x = alpha x0 + sigma eps at time t."""

    t: Tensor
    alpha: float
    sigma: float

    @property
    def ratio(self) -> float:
        """s = sigma / alpha; infinite at pure noise of models whose alpha ends at 0."""
        return self.sigma / self.alpha if self.alpha > 0 else math.inf


def levels_of(noise_schedule: NoiseSchedule, times: Tensor | Sequence[float]) -> list[Level]:
    """The levels of a time grid.

    Raises:
        ValueError: fewer than two times, times that do not decrease, or noise-free times before the last.
    """
    grid = torch.as_tensor(times, dtype=torch.float64).detach().cpu()
    if grid.ndim != 1 or len(grid) < 2:
        raise ValueError(f"times must be a grid of at least two, got shape {tuple(grid.shape)}")
    if not bool((grid.diff() < 0).all()):
        raise ValueError("times must decrease strictly, from noise to data")
    alpha, sigma = noise_schedule.alpha_sigma(grid)
    levels = [Level(t, a, s) for t, a, s in zip(grid, alpha.tolist(), sigma.tolist(), strict=True)]
    if levels[-2].sigma == 0.0:
        raise ValueError("only the last time may be free of noise")
    return levels


def log_interval(now: Level, after: Level) -> float:
    """The length of a step in log(s^2); 0 for a step to no noise, where the path ends and weights diverge."""
    if after.sigma == 0.0:
        return 0.0
    return 2.0 * math.log(now.ratio / after.ratio)


def disagreement(exponents: Sequence[float], outputs: Sequence[Tensor]) -> Tensor:
    """-sum g_i |o_i - o|^2 (B,) with o the weighted mean: differences of branches only, so any shared part may be missing.

    Sums are at least float32; bfloat16 and float16 outputs are widened before they are subtracted.
    """
    total = sum(exponents)
    outputs = [o.to(torch.promote_types(o.dtype, torch.float32)) for o in outputs]
    if len(outputs) == 1:
        return outputs[0].new_zeros(len(outputs[0]), dtype=torch.float64)
    if len(outputs) == 2:
        return (-exponents[0] * exponents[1] / total) * _square(outputs[0] - outputs[1])
    mean = sum(g / total * o for g, o in zip(exponents, outputs, strict=True))
    return -sum(g * _square(o - mean) for g, o in zip(exponents, outputs, strict=True))


def rate(exponents: Sequence[float], eps: Sequence[Tensor]) -> Tensor:
    """|E|^2 - sum g_i |eps_i|^2 (B,), float64: annealing part G (G - 1) |E/G|^2 and disagreement, without cancellation."""
    total = sum(exponents)
    value = disagreement(exponents, eps)
    if abs(total - 1.0) > 1e-12:
        mean = sum(g / total * e for g, e in zip(exponents, eps, strict=True))
        value = value + total * (total - 1.0) * _square(mean)
    return value


def _square(x: Tensor) -> Tensor:
    flat = x.reshape(len(x), -1)
    return torch.linalg.vector_norm(flat, dim=-1).to(torch.float64).square()


def first_weight(exponents: Sequence[float], x0: Sequence[Tensor], after: Level) -> Tensor:
    """Log-weights (B,) of a step from pure noise (alpha = 0), where eps says nothing but the x0-predictions do; G = 1."""
    if after.sigma == 0.0:
        return disagreement(exponents, x0) * 0.0
    return 0.5 * disagreement(exponents, x0) / after.ratio**2


@dataclass(frozen=True)
class Move:
    """x' = keep x + pull D + noise z, with D the mean of the branches' x0-predictions weighted by g_i / G."""

    keep: float
    pull: float
    noise: float


def move(now: Level, after: Level, total: float, multiplier: float) -> Move:
    r"""The proposal's step, exact for a constant D: its linear part is integrated, its noise has the matching variance.

    $\tilde x' = D + \rho^a (\tilde x - D) + \ell s' \sqrt{(1 - \rho^{2b}) / b}\,z$ with $\rho = s'/s$, $a = G(1 + \ell^2)$ and
    $b = a - 1$; for $G = 1$ it is DDIM at $\ell = 0$ and the ancestral step at $\ell = 1$.

    Args:
        now: the level x is at.
        after: the level to go to.
        total: G.
        multiplier: the noise multiplier, >= 0.
    """
    a = total * (1.0 + multiplier**2)
    if after.sigma == 0.0:
        return Move(0.0, after.alpha, 0.0)
    shrink = after.ratio / now.ratio
    power = shrink**a
    keep = after.alpha * (after.ratio / now.sigma) ** a * now.alpha ** (a - 1.0)
    noise = 0.0 if multiplier == 0.0 else multiplier * after.sigma * math.sqrt(_spread(shrink, a - 1.0))
    return Move(keep, after.alpha * (1.0 - power), noise)


def _spread(shrink: float, b: float) -> float:
    """(1 - shrink^2b) / b, continuous at b = 0 and at shrink = 0."""
    if shrink == 0.0:
        return 1.0 / b
    log = 2.0 * math.log(shrink)
    return -log if abs(b) < 1e-9 else -math.expm1(b * log) / b


def log_density_change(eps: Tensor, change: Tensor, now: Level, after: Level) -> Tensor:
    r"""How log q_i changes along a step of noise multiplier 1 (B,), for exponents that vary in time.

    Two estimates that agree for short steps and whose errors have opposite signs, averaged: Itô's formula for
    $\log q_s(\tilde x)$, whose Laplacian cancels because the path's noise is the model's, and the ratio of the denoising to the
    noising kernel (He et al. 2025, arXiv:2506.05668).

    Args:
        eps: (B, *E) the branch's noise prediction before the step.
        change: (B, *E) the step taken, in x / alpha.
        now: the level before.
        after: the level after, not free of noise.
    """
    eps, change = eps.flatten(1), change.flatten(1)
    span, shrink = now.ratio**2 - after.ratio**2, (after.ratio / now.ratio) ** 2
    inner = (eps * change).sum(-1, dtype=torch.float64) / now.ratio
    ito = -inner - 0.5 * _square(eps) * (1.0 - shrink)
    denoising = -0.5 * _square(change + span / now.ratio * eps) / (span * shrink) - 0.5 * eps.shape[1] * math.log(shrink)
    return 0.5 * (ito + denoising + 0.5 * _square(change) / span)


def log_gaussian_integral(total: float, dimension: int, level: Level) -> float:
    """Log of the integral of N(x; 0, sigma^2 I)^G over x / alpha: the normaliser the path starts from."""
    if total == 1.0:
        return 0.0
    return 0.5 * dimension * ((1.0 - total) * math.log(2.0 * math.pi * level.ratio**2) - math.log(total))

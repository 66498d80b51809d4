"""Weights of particles, as logarithms in float64; the last axis is the K particles of a group, axes before it are groups."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def clean(log_w: Tensor) -> Tensor:
    """Log-weights (..., K) as float64 with NaN read as zero weight; groups that have died out get equal weights."""
    log_w = torch.where(log_w.isnan(), -math.inf, log_w.to(torch.float64))
    dead = log_w.amax(-1, keepdim=True) == -math.inf
    return torch.where(dead, torch.zeros_like(log_w), log_w)


def normalise(log_w: Tensor) -> Tensor:
    """Weights (..., K) that sum to 1."""
    return clean(log_w).softmax(-1)


def log_mean_exp(log_w: Tensor) -> Tensor:
    """Logarithm (...) of the mean weight; minus infinity for a group that has died out."""
    return torch.where(log_w.isnan(), -math.inf, log_w.to(torch.float64)).logsumexp(-1) - math.log(log_w.shape[-1])


def ess(log_w: Tensor) -> Tensor:
    """Effective sample size (...), between 1 and K: one over the sum of squared weights."""
    return 1.0 / normalise(log_w).square().sum(-1)


def conditional_ess(log_w: Tensor, increment: Tensor) -> Tensor:
    """Conditional effective sample size (...) of one increment (Zhou, Johansen & Aston 2016, arXiv:1303.3123, eq. 3.16).

    Args:
        log_w: (..., K) before the increment.
        increment: (..., K) of the log-weights.

    Returns:
        K (sum W u)^2 / sum W u^2, which is K when the increment says nothing.
    """
    before = clean(log_w).log_softmax(-1)
    increment = clean(increment)
    first, second = (before + increment).logsumexp(-1), (before + 2 * increment).logsumexp(-1)
    return log_w.shape[-1] * (2 * first - second).exp()


def tempered(log_w: Tensor, increment: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """The largest share of an increment that keeps the effective sample size.

    Args:
        log_w: (..., K) before the increment.
        increment: (..., K).
        floor: share of K that the effective sample size must keep, where it had it before.

    Returns:
        The scaled increment (..., K) and the share kappa (...), 1 where nothing had to be done.
    """
    increment = clean(increment)
    target = torch.minimum(floor * log_w.shape[-1] * torch.ones_like(ess(log_w)), ess(log_w))
    low, high = torch.zeros_like(target), torch.ones_like(target)
    whole = ess(log_w + increment) >= target
    for _ in range(30):
        middle = (low + high) / 2
        fits = ess(log_w + middle[..., None] * increment) >= target
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    kappa = torch.where(whole, 1.0, low)
    return kappa[..., None] * increment, kappa

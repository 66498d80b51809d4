"""Rows of token probabilities: sharpening, truncation, jump kernels and draws.

A *kernel* is a tensor (B, L, S) whose row [b, i] is the law of site i's next token; sites are drawn independently.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

UNDERFLOW = 60.0  # exp(-60) is still a normal number in float32


def sharpen(probs: Tensor, exponent: float | Tensor) -> Tensor:
    """Rows proportional to ``probs ** exponent``; zeros stay zeros. The exponent is an inverse temperature."""
    if not torch.is_tensor(exponent):
        if exponent * math.log(probs.shape[-1]) > UNDERFLOW:  # a row's largest entry is at least 1 / V
            probs = probs / probs.amax(-1, keepdim=True)
        powers = probs.pow(exponent)
        return powers / powers.sum(-1, keepdim=True)
    positive = probs > 0  # gradients in the exponent and in the rows, also beside exact zeros
    logs = torch.where(positive, probs, 1.0).log()
    top = logs.masked_fill(~positive, -torch.inf).amax(-1, keepdim=True)
    powers = torch.where(positive, (exponent * (logs - top)).exp(), 0.0)
    return powers / powers.sum(-1, keepdim=True)


def nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Keep each row's smallest set of most probable tokens with total at least ``top_p`` (Holtzman et al. 2020)."""
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    ordered, index = probs.sort(dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    kept = ordered.masked_fill(before >= top_p, 0.0)
    out = torch.zeros_like(probs).scatter(-1, index, kept)
    return out / out.sum(-1, keepdim=True)


def draw(probs: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Token ids (B, L), one draw per row of ``probs`` (B, L, S) by inversion; rows need not sum to one."""
    cdf = probs.cumsum(-1)
    total = cdf[..., -1:]
    point = uniform(total.shape, total, generator) * total
    point = torch.minimum(point, torch.nextafter(total, torch.zeros_like(total)))  # a row's end is never reached
    return torch.searchsorted(cdf, point, right=True).squeeze(-1)


def uniform(shape: torch.Size | tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform [0, 1) draws in the dtype and place of ``like``, made where the generator lives."""
    device = like.device if generator is None else generator.device
    dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
    return torch.rand(shape, generator=generator, dtype=dtype, device=device).to(like.device)


def one_hot(x: Tensor, states: int, like: Tensor) -> Tensor:
    """Rows (B, L, states) in ``like``'s dtype with all mass on ``x``."""
    return (x[..., None] == torch.arange(states, device=x.device)).to(like.dtype)


def euler_rows(jumps: Tensor, x: Tensor) -> Tensor:
    """First-order kernel of expected jumps (B, L, S); a total above one is scaled down to a sure jump."""
    total = jumps.sum(-1, keepdim=True)
    rows = jumps / total.clamp(min=1.0)
    stay = 1.0 - total.clamp(max=1.0)
    return rows + stay * one_hot(x, rows.shape[-1], rows)


def tau_rows(jumps: Tensor, x: Tensor) -> Tensor:
    """Kernel of tau-leaping with at most one jump per site: a jump with probability 1 - exp(-total)."""
    total = jumps.sum(-1, keepdim=True)
    some = total > 0
    share = torch.where(some, -torch.expm1(-total) / torch.where(some, total, 1.0), 1.0)
    return jumps * share + torch.exp(-total) * one_hot(x, jumps.shape[-1], jumps)

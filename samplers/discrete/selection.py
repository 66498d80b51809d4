"""Which masked sites are revealed: at random, by confidence, or at exact hitting times."""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels import draw, uniform
from .processes import MaskedProcess
from .survival import as_float64
from .transitions import Step


def expected_reveals(hidden: Tensor, sites: Tensor, step: Step) -> Tensor:
    """Number (B,) float64 of masked sites that step should reveal, perhaps fractional.

    Args:
        hidden: number (B,) of sites masked now.
        sites: number (B,) of sites that were masked at the start.
        step: its ``target`` is the share revealed afterwards; without one, whole tokens as even as they go.
    """
    sites64 = sites.double()
    if step.last:
        return hidden.double()
    if step.target is None:
        goal = ((step.index + 1) * sites // step.steps).double()
    else:
        goal = sites64 * step.target
        near = goal.detach().round()
        goal = torch.where((goal - near).abs() < 1e-9, near, goal)  # 1/3 of 3 is one token, not 0.9999
    return torch.minimum((goal - (sites64 - hidden)).clamp(min=0.0), hidden.double())


def to_reveal(masked: Tensor, sites: Tensor, step: Step, generator: torch.Generator | None) -> Tensor:
    """Number (B,) int64 of sites to reveal; fractions are rounded at random, without bias."""
    expected = expected_reveals(masked.sum(-1), sites, step)
    return (expected + uniform(expected.shape, expected, generator)).floor().long()


def most_confident(scores: Tensor, masked: Tensor, wanted: Tensor) -> Tensor:
    """Mask (B, L) of the ``wanted`` highest-scoring masked sites; ties go to the earlier site."""
    order = scores.masked_fill(~masked, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order))
    return (rank < wanted[:, None]) & masked


def reveal_random(
    process: MaskedProcess, probs: Tensor, x: Tensor, wanted: Tensor, generator: torch.Generator | None
) -> Tensor:
    """Ids with ``wanted`` (B,) masked sites, chosen uniformly, drawn from ``probs``."""
    chosen = most_confident(uniform(x.shape, probs, generator), x == process.mask_id, wanted)
    return torch.where(chosen, draw(probs, generator), x)


def by_confidence(
    process: MaskedProcess, probs: Tensor, x: Tensor, wanted: Tensor, heat: float, generator: torch.Generator | None
) -> Tensor:
    """Ids with the ``wanted`` (B,) drawn tokens kept that the model finds most probable, plus ``heat`` times Gumbel noise."""
    tokens = draw(probs, generator)
    scores = probs.gather(-1, tokens[..., None])[..., 0].log()
    if heat > 0.0:
        tiny = torch.finfo(scores.dtype).tiny
        scores = scores - heat * (-uniform(x.shape, scores, generator).clamp(min=tiny).log()).clamp(min=tiny).log()
    return torch.where(most_confident(scores, x == process.mask_id, wanted), tokens, x)


def first_hit(process: MaskedProcess, clock: Tensor, x: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """The next site to be revealed, mask (B, L), and the time (B,) when it happens, given the times (B,) so far.

    Among n masked sites the mask probability 1 - alpha falls by the factor U^(1/n) until the first is revealed.
    """
    masked = x == process.mask_id
    left = masked.sum(-1).clamp(min=1)
    chance = uniform(clock.shape, clock, generator).clamp(min=1e-300)
    hidden = (1.0 - as_float64(process.alpha(clock))) * chance ** (1.0 / left)
    return most_confident(uniform(x.shape, clock, generator), masked, torch.ones_like(left)), process.schedule.t_of_alpha(
        1.0 - hidden
    )

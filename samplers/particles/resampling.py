"""Resampling schemes: from log-weights to ancestors, unbiased in the number of offspring (birth-death: to first order).

All work on groups at once, draw from an explicit generator, and stay on the weights' device. Chopin & Papaspiliopoulos 2020,
"An Introduction to Sequential Monte Carlo", chapter 9, has the classical ones; Gerber, Chopin & Whiteley 2019
(arXiv:1708.09340) SSP; Chopin, Singh, Soto & Vihola 2022 (arXiv:2203.10037) which of them suit small weight increments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .weights import clean, normalise

Generators = torch.Generator | Sequence[torch.Generator] | None  # a sequence has one for each group


def resample(log_w: Tensor, scheme: str = "systematic", generator: Generators = None) -> Tensor:
    """Draw ancestors so that particle i has K W_i offspring on average.

    Args:
        log_w: (K,), or (P, K) for P groups; need not be normalised. NaN means no weight.
        scheme: one of `SCHEMES`. "systematic" varies least and is the default; "ssp" has the same offspring bounds with a proof
            of consistency; "killing", "ssp" and "birth_death" have a limit when weights are small and resampling is done every
            step; "multinomial" is for reference.
        generator: source of the uniforms; a list has one for each group, whose ancestors then do not depend on the others.

    Returns:
        Ancestors, int64 in [0, K), in the shape of ``log_w``.

    Raises:
        ValueError: unknown scheme, a shape without particles, or another number of generators than groups.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"unknown resampling scheme {scheme!r}; known: {', '.join(SCHEMES)}")
    if log_w.ndim not in (1, 2) or log_w.shape[-1] == 0:
        raise ValueError(f"log_w must have shape (K,) or (P, K) with K >= 1, got {tuple(log_w.shape)}")
    rows = clean(torch.atleast_2d(log_w))
    if isinstance(generator, Sequence) and len(generator) != len(rows):
        raise ValueError(f"{len(generator)} generators for {len(rows)} groups; pass one for each, or one alone")
    return SCHEMES[scheme](rows, generator).reshape(log_w.shape)


def uniforms(rows: int, columns: int, generator: Generators, device: torch.device) -> Tensor:
    """(rows, columns) float64 in [0, 1), drawn where the generator lives; with several, each draws its row."""
    if isinstance(generator, Sequence):
        return torch.cat([uniforms(1, columns, one, device) for one in generator])
    at = device if generator is None else generator.device
    return torch.rand(rows, columns, generator=generator, dtype=torch.float64, device=at).to(device)


def draw_one(w: Tensor, generator: Generators) -> Tensor:
    """One index (P, 1) per row of the weights (P, K), drawn in proportion to them."""
    return _invert(w, uniforms(len(w), 1, generator, w.device))


def _invert(w: Tensor, points: Tensor) -> Tensor:
    """Indices at which the cumulative weights (P, K) pass ``points`` (P, M) in [0, 1)."""
    cumulative = w.cumsum(-1)
    cumulative = cumulative / cumulative[:, -1:]  # rounding must not leave a gap below 1
    found = torch.searchsorted(cumulative, points.contiguous(), right=True)
    # a point that rounds to 1 falls behind the last particle that has weight, not on one that has none
    last = torch.searchsorted(cumulative, torch.ones_like(cumulative[:, :1]))
    return torch.minimum(found, last)


def _repeat(counts: Tensor) -> Tensor:
    """Ancestors (P, K) from offspring counts (P, K) whose rows sum to K."""
    rows, k = counts.shape
    each = torch.arange(k, device=counts.device).repeat(rows)
    return torch.repeat_interleave(each, counts.reshape(-1), output_size=rows * k).reshape(rows, k)


def _multinomial(log_w: Tensor, generator: Generators) -> Tensor:
    return _invert(log_w.softmax(-1), uniforms(*log_w.shape, generator, log_w.device))


def _spaced(log_w: Tensor, generator: Generators, columns: int) -> Tensor:
    k = log_w.shape[-1]
    jitter = uniforms(len(log_w), columns, generator, log_w.device)
    return _invert(log_w.softmax(-1), (torch.arange(k, device=log_w.device) + jitter) / k)


def _stratified(log_w: Tensor, generator: Generators) -> Tensor:
    return _spaced(log_w, generator, log_w.shape[-1])


def _systematic(log_w: Tensor, generator: Generators) -> Tensor:
    return _spaced(log_w, generator, 1)


def _floors(log_w: Tensor) -> tuple[Tensor, Tensor]:
    """Whole offspring and what is left of the expectations K W; rounding below a whole number counts as that number."""
    expected = log_w.softmax(-1) * log_w.shape[-1]
    whole = (expected + 1e-12 * log_w.shape[-1]).floor()
    return whole.long(), (expected - whole).clamp(min=0.0)


def _residual(log_w: Tensor, generator: Generators) -> Tensor:
    k = log_w.shape[-1]
    counts, rest = _floors(log_w)
    missing = k - counts.sum(-1, keepdim=True)
    rest = torch.where(missing > 0, rest, torch.ones_like(rest))  # nothing left to draw: any law will do
    drawn = _invert(rest, uniforms(*log_w.shape, generator, log_w.device))
    wanted = torch.arange(k, device=log_w.device) < missing
    return _repeat(counts.scatter_add(-1, drawn, wanted.long()))


def _ssp(log_w: Tensor, generator: Generators) -> Tensor:
    """Pairs of fractional expectations play against each other until each is 0 or 1 (the pivotal method)."""
    counts, rest = _floors(log_w)
    draws = uniforms(*log_w.shape, generator, log_w.device)
    extra = [
        _pivotal(p, u, k)
        for p, u, k in zip(rest.tolist(), draws.tolist(), (log_w.shape[-1] - counts.sum(-1)).tolist(), strict=True)
    ]
    return _repeat(counts + torch.tensor(extra, device=log_w.device))


def _pivotal(p: list[float], u: list[float], wanted: int) -> list[int]:
    """0 or 1 for each inclusion probability, ``wanted`` ones in all; the expectation is ``p``."""
    chosen = [0] * len(p)
    holder, held = 0, p[0]
    for rival in range(1, len(p)):
        total = held + p[rival]
        if total < 1.0:  # one leaves with nothing, the other holds the sum
            if total > 0.0 and u[rival] * total >= held:
                holder = rival
            held = total
        else:  # one is chosen, the other keeps what is over
            over = total - 1.0
            if u[rival] * (1.0 - over) < 1.0 - p[rival]:
                chosen[holder] = 1
                holder = rival
            else:
                chosen[rival] = 1
            held = over
    chosen[holder] += wanted - sum(chosen)  # what it holds is 0 or 1 but for rounding
    return chosen


def _killing(log_w: Tensor, generator: Generators) -> Tensor:
    """Each particle stays with probability W_i / max W; the killed are replaced by independent draws."""
    k = log_w.shape[-1]
    draws = uniforms(len(log_w), 2 * k, generator, log_w.device)
    stays = draws[:, :k] < (log_w - log_w.amax(-1, keepdim=True)).exp()
    return torch.where(stays, torch.arange(k, device=log_w.device), _invert(log_w.softmax(-1), draws[:, k:]))


def _birth_death(log_w: Tensor, generator: Generators) -> Tensor:
    """The jump process of the Feynman-Kac equation: few particles move, and the law is right to first order in the weights.

    A particle whose log-weight is below the mean dies at the rate of the gap (an exponential clock, which has no memory, so
    none is kept between steps) and is replaced in proportion to the gaps above the mean.
    """
    k = log_w.shape[-1]
    finite = log_w.clamp(min=-700.0 + log_w.amax(-1, keepdim=True))  # no weight at all: certain death, not a NaN
    gap = finite - finite.mean(-1, keepdim=True)
    draws = uniforms(len(log_w), 2 * k, generator, log_w.device)
    dies = draws[:, :k] < -torch.expm1(gap.clamp(max=0.0))
    above = gap.clamp(min=0.0)
    above = torch.where(above.sum(-1, keepdim=True) > 0, above, torch.ones_like(above))
    return torch.where(dies, _invert(above, draws[:, k:]), torch.arange(k, device=log_w.device))


SCHEMES: dict[str, Callable[[Tensor, Generators], Tensor]] = {
    "systematic": _systematic,
    "stratified": _stratified,
    "residual": _residual,
    "ssp": _ssp,
    "multinomial": _multinomial,
    "killing": _killing,
    "birth_death": _birth_death,
}


def expected_offspring(log_w: Tensor) -> Tensor:
    """K W (..., K): what every unbiased scheme gives on average."""
    return normalise(log_w) * log_w.shape[-1]

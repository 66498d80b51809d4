"""The law a sampler really has, by enumeration, differentiable in the table's numbers.

The state law w over S^L is pushed through each step. Rows of a kernel are independent over sites, so a push is two outer
products and one matrix product; the choice of a fixed number of sites is read off the kernel's generating polynomial.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels import one_hot
from .processes import MaskedProcess, Process
from .run import Model, neutral, plan, shaped, table_steps
from .selection import expected_reveals, most_confident
from .table import DiscreteTable
from .transitions import Step, Transition, second_rows, transition, trial_rows, trial_time

LIMIT = 20_000  # states that are enumerated
CHUNK = 2**18  # pairs of states at a time


def exact_law(
    model: Model,
    process: Process,
    length: int,
    nfe: int | None = None,
    transition: str = "tweedie",
    table: DiscreteTable | None = None,
    *,
    grid: str = "uniform",
) -> Tensor:
    """Law (V,) * length of a sampler's output, float64.

    Args:
        model: as in `sample_discrete`; must be deterministic.
        process: the noising process.
        length: number of sites L.
        nfe: network evaluations; with a ``table`` it must be the table's, or left out.
        transition: text of the transition.
        table: a learned sampler; overrides ``transition`` and ``grid``. Its numbers may be tensors: gradients flow.
        grid: named time grid of a plain sampler.

    Raises:
        ValueError: too many states, or a transition whose law cannot be enumerated (first_hitting, noisy confidence).
    """
    states = process.states**length
    if states > LIMIT:
        raise ValueError(
            f"{process.states}^{length} states cannot be enumerated (limit {LIMIT}); estimate from samples instead"
        )
    return push_table(model, process, length, plan(process, nfe, transition, table, grid))


def push_table(model: Model, process: Process, length: int, table: DiscreteTable) -> Tensor:
    """`exact_law` of a table that is known to be sound."""
    base = transition(table.transition)
    if base.kind == "first_hitting":
        raise ValueError(
            "first_hitting has continuous query times; fixed_count with nfe = L has its law for models without time"
        )
    if base.kind == "confidence" and base.parameters["noise"] > 0.0:
        raise ValueError("the law of confidence with noise > 0 cannot be enumerated; estimate it from samples")
    ids = torch.cartesian_prod(*[torch.arange(process.states)] * length).view(-1, length)
    weights = _start(process, ids)
    for step in table_steps(table):
        active = weights.detach() > 0
        weights = _push_step(model, process, base, step, ids, ids[active], weights[active])
        if not neutral(step.remask, 0.0) and not step.last:
            hot = one_hot(ids, process.states, weights)
            masked = one_hot(torch.full_like(ids, process.mask_id), process.states, weights)
            weights = push(weights, torch.lerp(hot, masked, torch.as_tensor(step.remask, dtype=hot.dtype)))
    law = weights.view((process.states,) * length)
    return law[(slice(process.vocab),) * length]


def push(weights: Tensor, rows: Tensor) -> Tensor:
    """Law (S^L,) after independent sites: weights (N,) over states, rows (N, L, S)."""
    half = rows.shape[1] // 2
    left, right = weights[:, None], torch.ones_like(weights)[:, None]
    for i in range(rows.shape[1]):
        if i < half:
            left = (left[:, :, None] * rows[:, i, None, :]).flatten(1)
        else:
            right = (right[:, :, None] * rows[:, i, None, :]).flatten(1)
    return (left.T @ right).flatten()


def _start(process: Process, ids: Tensor) -> Tensor:
    if isinstance(process, MaskedProcess):
        return (ids == process.mask_id).all(-1).double()
    return torch.full((len(ids),), 1.0 / len(ids), dtype=torch.float64)


def _posterior(model: Model, process: Process, base: Transition, step: Step, x: Tensor, t: float | Tensor) -> Tensor:
    probs = model(x, torch.as_tensor(t, dtype=torch.float64)).double()
    return process.settle(shaped(probs, step.temp, base.parameters["top_p"]), x)


def _push_step(model: Model, process: Process, base: Transition, step: Step, ids: Tensor, x: Tensor, weights: Tensor) -> Tensor:
    """Law (S^L,) after a step from the law ``weights`` (N,) over states ``x`` (N, L)."""
    probs = _posterior(model, process, base, step, x, step.t)
    if base.kind == "count":
        return _push_count(process, probs, x, weights, step)
    if base.kind == "confidence":
        return _push_confidence(process, probs, ids, x, weights, step)
    if base.kind == "kernel":
        finish = process.finish(probs, x) if step.last else None
        return push(weights, base.rows(process, probs, x, step, base.parameters) if finish is None else finish)
    if step.last and base.parameters["last"] == 1:
        return push(weights, process.finish(probs, x))
    before = process.reverse_rates(probs, x, step.t) * step.rate
    rows = trial_rows(base, before, x, step)
    time = trial_time(base, step)
    again = _posterior(model, process, base, step, ids, time)
    if step.last:
        return push(push(weights, rows), process.finish(again, ids))
    after = process.reverse_rates(again, ids, time) * step.rate
    total = torch.zeros(len(ids), dtype=torch.float64)
    for part in torch.arange(len(x)).split(max(1, CHUNK // len(ids))):
        reach = _joint(weights[part], rows[part])
        start, trial = (reach.detach() > 0).nonzero(as_tuple=True)
        second = second_rows(base, before[part][start], after[trial], x[part][start], ids[trial], step)
        total = total + push(reach[start, trial], second)
    return total


def _joint(weights: Tensor, rows: Tensor) -> Tensor:
    """Probabilities (N, S^L) of every pair of states."""
    joint = weights[:, None]
    for i in range(rows.shape[1]):
        joint = (joint[:, :, None] * rows[:, i, None, :]).flatten(1)
    return joint


def _counts(process: MaskedProcess, x: Tensor, step: Step) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Masked sites, sites to reveal, and the chance of that number: the two roundings of a perhaps fractional number."""
    hidden = (x == process.mask_id).sum(-1)
    expected = expected_reveals(hidden, torch.full_like(hidden, x.shape[1]), step)
    low = expected.detach().floor()
    share = expected - low
    return [(hidden, low, 1.0 - share), (hidden, torch.minimum(low + 1.0, hidden.double()), share)]


def _push_count(process: MaskedProcess, probs: Tensor, x: Tensor, weights: Tensor, step: Step) -> Tensor:
    """A uniformly chosen set of c masked sites: the z^c coefficient of prod(stay + z D), by a discrete Fourier transform."""
    points, total = x.shape[1] + 1, torch.zeros(process.states ** x.shape[1], dtype=torch.float64)
    choices = _counts(process, x, step)
    stay = process.reveal(probs, x, 0.0).to(torch.complex128)
    jump = process.reveal(probs, x, 1.0).to(torch.complex128)
    masked = (x == process.mask_id)[..., None]
    for j in range(points):
        z = torch.polar(torch.tensor(1.0, dtype=torch.float64), torch.tensor(2.0 * torch.pi * j / points, dtype=torch.float64))
        coefficient = sum(chance * z ** (-c) / _binomial(m, c) for m, c, chance in choices)
        rows = torch.where(masked, stay + z * jump, stay)
        total = total + push(weights * coefficient, rows).real / points
    return total.clamp(min=0.0).where(total.detach() > 1e-15, 0.0)


def _binomial(n: Tensor, k: Tensor) -> Tensor:
    n = n.double()
    return torch.exp(torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1))


def _push_confidence(process: MaskedProcess, probs: Tensor, ids: Tensor, x: Tensor, weights: Tensor, step: Step) -> Tensor:
    """All drawn completions, of which the most confident tokens are kept."""
    total = torch.zeros(len(ids), dtype=torch.float64)
    full = process.finish(probs, x)
    place = process.states ** torch.arange(x.shape[1] - 1, -1, -1)
    for part in torch.arange(len(x)).split(max(1, CHUNK // len(ids))):
        reach = _joint(weights[part], full[part])
        start, done = (reach.detach() > 0).nonzero(as_tuple=True)
        tokens, state = ids[done], x[part][start]
        scores = probs[part][start].gather(-1, tokens[..., None])[..., 0].detach().log()
        for _, wanted, chance in _counts(process, state, step):
            kept = torch.where(most_confident(scores, state == process.mask_id, wanted), tokens, state)
            total = total.index_add(0, (kept * place).sum(-1), reach[start, done] * chance)
    return total

"""`exact_kl`: the law of the student is enumerated, and the KL's gradient flows through every step of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from samplers.discrete import DiscreteTable, Model, Process, push_table

from .knobs import KnobSpace

FLOOR = 1e-30  # a sequence the student cannot make costs 69 nats, not infinity


def exact_kl(model: Model, process: Process, seq_len: int, table: DiscreteTable, law: Tensor) -> Tensor:
    """KL of the table's law from ``law`` (V,) * L, 0-d, differentiable in the table's numbers."""
    student = push_table(model, process, seq_len, table).flatten()
    p = law.flatten()
    some = p > 0
    return (p[some] * (p[some].log() - student[some].clamp(min=FLOOR).log())).sum()


def fit_exact(
    space: KnobSpace,
    model: Model,
    process: Process,
    law: Tensor,
    *,
    iterations: int = 120,
    lr: float = 0.15,
    progress: Callable[[int, int, float], None] | None = None,
) -> tuple[Tensor, float]:
    """Adam from the plain sampler; the best vector met and its KL.

    Args:
        space: the family of tables.
        model: deterministic; evaluated at times that carry gradients.
        process: the noising process.
        law: (V,) * L.
        iterations: gradient steps.
        lr: first learning rate, lowered to a twentieth along a cosine.
        progress: called with (done, iterations, KL).
    """
    with torch.enable_grad():
        vector = space.start().requires_grad_()
        optimiser = torch.optim.Adam([vector], lr=lr, betas=(0.9, 0.95))
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, iterations, eta_min=lr / 20)
        best, value = vector.detach().clone(), float("inf")
        for step in range(iterations):
            loss = exact_kl(model, process, space.seq_len, space.table(vector), law)
            now = float(loss.detach())
            if now < value:
                best, value = vector.detach().clone(), now
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            decay.step()
            if progress:
                progress(step + 1, iterations, value)
    return best, value

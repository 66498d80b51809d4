"""First-order recipes: one network answer per step, no history."""

from __future__ import annotations

from ..strategy import StepStrategy


def ddim(n: int, to_zero: bool) -> tuple[StepStrategy, ...]:
    """DDIM (Song et al. 2021, arXiv:2010.02502, eq. 12 with eta = 0): the exact step for a constant x0-prediction.

    Order 1, one NFE a step. When x0 is clipped, the noise prediction is the unclipped one, as in diffusers.
    """
    return (StepStrategy(order=1, keep_eps=True),) * n


def euler(n: int, to_zero: bool) -> tuple[StepStrategy, ...]:
    r"""Euler in $\sigma/\alpha$ (Karras et al. 2022, arXiv:2206.00364, algorithm 1 without churn).

    Order 1, one NFE a step. The same step as DDIM; for flow models the Euler step of the velocity field.
    """
    return (StepStrategy(order=1),) * n

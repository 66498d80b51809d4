"""Exponential and plain Adams-Bashforth multistep rules on the noise prediction: DEIS and iPNDM."""

from __future__ import annotations

from ..strategy import StepStrategy
from .dpmpp import SHORT


def deis(
    n: int, to_zero: bool, *, order: int = 2, axis: str = "lambda", lower_order_final: bool = True
) -> tuple[StepStrategy, ...]:
    r"""DEIS (Zhang & Chen 2023, arXiv:2204.13902, eq. 14): the noise prediction's polynomial, integrated exactly.

    Order ``order``, one NFE a step.

    Args:
        n: steps.
        to_zero: the last step ends at sigma = 0; it is then first order, as elsewhere.
        order: 1..4.
        axis: variable of the polynomial: "lambda" (the log-rho variant, diffusers' default), "t" (the paper's tAB) or
            "sigma" (rhoAB).
        lower_order_final: lower the last steps' orders when n < 15.

    Raises:
        ValueError: an argument outside the above.
    """
    if not 1 <= order <= 4:
        raise ValueError(f"deis: order must be 1..4, got {order}")
    if axis not in ("lambda", "t", "sigma"):
        raise ValueError(f"deis: unknown axis {axis!r}; known: lambda, t, sigma")
    lowered = lower_order_final and n < SHORT
    steps = []
    for i in range(n):
        p = min(order, i + 1)
        if i == n - 1 and (to_zero or lowered):
            p = 1
        elif i == n - 2 and lowered:
            p = min(p, 2)
        steps.append(StepStrategy(order=p, pred="eps", axis=axis))  # type: ignore[arg-type]  # checked above
    return tuple(steps)


def ipndm(n: int, to_zero: bool, *, order: int = 4) -> tuple[StepStrategy, ...]:
    r"""iPNDM (Zhang & Chen 2023, arXiv:2204.13902, section 3.3): constant-step Adams-Bashforth weights in $\sigma/\alpha$.

    One NFE a step. It ignores the ratio of the steps, so it is of its order on grids even in sigma / alpha only; on others
    it is first order, yet often the best classic rule at few steps.

    Args:
        n: steps.
        to_zero: not needed: the rule is finite at sigma = 0.
        order: 1..4; the first steps use what history there is.

    Raises:
        ValueError: an order outside 1..4.
    """
    if not 1 <= order <= 4:
        raise ValueError(f"ipndm: order must be 1..4, got {order}")
    return tuple(StepStrategy(order=min(order, i + 1), pred="eps", axis="index") for i in range(n))

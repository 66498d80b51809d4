"""DPM-Solver++ (Lu et al. 2022, arXiv:2211.01095): data prediction, Taylor in lambda."""

from __future__ import annotations

from ..strategy import Relax, StepStrategy

SHORT = 15  # in-tree schedulers lower the last orders of runs shorter than this


def dpmpp(
    n: int,
    to_zero: bool,
    *,
    order: int = 2,
    method: str = "multistep",
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    taylor: bool = False,
) -> tuple[StepStrategy, ...]:
    """DPM-Solver++ 2M, 3M (multistep) and 2S (singlestep), as every common implementation has them.

    One NFE a step; singlestep 2 makes two steps of which the second restarts from the first one's beginning. Order 2
    is second order. Order 3 as published in code halves its second derivative, which leaves it second order; ``taylor=true``
    does not halve and is third order.

    Args:
        n: steps.
        to_zero: the last step ends at sigma = 0 and must be first order.
        order: 1..3.
        method: "multistep" (orders 1-3) or "singlestep" (orders 1-2).
        solver_type: "midpoint" (the paper's) or "heun" (the exact Taylor coefficient) for second-order steps.
        lower_order_final: lower the last steps' orders when n < 15.
        taylor: exact Taylor coefficients at order 3.

    Raises:
        ValueError: an argument outside the above.
    """
    highest = {"multistep": 3, "singlestep": 2}
    if method not in highest:
        raise ValueError(f"dpmpp: unknown method {method!r}; known: multistep, singlestep")
    if not 1 <= order <= highest[method]:
        raise ValueError(f"dpmpp: order {order} is not available for method {method}; known: 1..{highest[method]}")
    if solver_type not in ("midpoint", "heun"):
        raise ValueError(f"dpmpp: unknown solver_type {solver_type!r}; known: midpoint, heun")
    relax: Relax = "bh2" if solver_type == "midpoint" else None
    first, second = StepStrategy(order=1), StepStrategy(order=2, relax=(relax,))
    if method == "singlestep":
        if order == 1:
            return (first,) * n
        restart = StepStrategy(order=2, start=-2, relax=(relax,))
        steps = [first, restart] * (n // 2) + [first] * (n % 2)
        if to_zero or (lower_order_final and n % 2 == 0 and n > 0):
            steps[-1] = first
        return tuple(steps)
    third = StepStrategy(order=3, relax=() if taylor else (None, "half"))
    lowered = lower_order_final and n < SHORT
    out = []
    for i in range(n):
        here = min(order, i + 1)
        if i == n - 1 and (to_zero or lowered):
            here = 1
        elif i == n - 2 and lowered:
            here = min(here, 2)
        out.append((first, second, third)[here - 1])
    return tuple(out)

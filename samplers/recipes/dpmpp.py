"""DPM-Solver++ (Lu et al. 2022, arXiv:2211.01095): data prediction, Taylor in lambda."""

from __future__ import annotations

from typing import Literal

from ..strategy import Noise, Relax, StepStrategy
from .grids import TimeGrid

SHORT = 15  # in-tree schedulers lower the last orders of runs shorter than this


def dpmpp(
    grid: TimeGrid,
    *,
    order: int = 2,
    method: str = "multistep",
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    taylor: bool = False,
    tau: float = 0.0,
    as_in_diffusers: bool = False,
) -> tuple[StepStrategy, ...]:
    """DPM-Solver++ (Lu et al. 2022, arXiv:2211.01095): 2M, 3M, 2S, 3S, and the SDE variants of 2M and 3M.

    One NFE a step; singlestep order p makes blocks of p steps, each restarting from its block's beginning; order 3 is third
    order on grids even in lambda, where its inner times are at thirds, and second order on others. Multistep order 3
    as published in code halves its second derivative, which leaves it second order; ``taylor=true`` does not halve and is
    third order.

    Args:
        grid: the times.
        order: 1..3.
        method: "multistep" or "singlestep".
        solver_type: "midpoint" (the paper's) or "heun" (the exact Taylor coefficient).
        lower_order_final: lower the last steps' orders when n < 15.
        taylor: exact Taylor coefficients at multistep order 3.
        tau: noise of the SDE variant (1 is SDE-DPM-Solver++), multistep only.
        as_in_diffusers: SDE order 3 with the sign that diffusers gives one term of the second derivative; k-diffusion's
            dpmpp_3m_sde has the one that follows from the derivation.

    Raises:
        ValueError: an argument outside the above.
    """
    return taylor_steps(
        grid,
        "dpmpp",
        "x0",
        order=order,
        method=method,
        solver_type=solver_type,
        lower_order_final=lower_order_final,
        taylor=taylor,
        tau=tau,
        second="diffusers-3m-sde" if as_in_diffusers and tau else "half",
    )


def taylor_steps(
    grid: TimeGrid,
    name: str,
    pred: Literal["x0", "eps"],
    *,
    order: int,
    method: str,
    solver_type: str,
    lower_order_final: bool,
    taylor: bool = False,
    tau: float = 0.0,
    second: Literal["half", "diffusers-3m-sde"] = "half",
) -> tuple[StepStrategy, ...]:
    """The steps of DPM-Solver and DPM-Solver++, which differ in ``pred`` alone."""
    if method not in ("multistep", "singlestep"):
        raise ValueError(f"{name}: unknown method {method!r}; known: multistep, singlestep")
    if not 1 <= order <= 3:
        raise ValueError(f"{name}: order must be 1..3, got {order}")
    if solver_type not in ("midpoint", "heun"):
        raise ValueError(f"{name}: unknown solver_type {solver_type!r}; known: midpoint, heun")
    if tau and method == "singlestep":
        raise ValueError(f"{name}: tau = {tau} needs method multistep")
    relax: Relax = "bh2" if solver_type == "midpoint" else None
    noise = Noise(kind="tau", amount=tau) if tau else None
    first = StepStrategy(order=1, pred=pred, noise=noise)
    middle = StepStrategy(order=2, pred=pred, relax=(relax,), noise=noise)
    if method == "singlestep":
        block = [first, StepStrategy(order=2, pred=pred, start=-2, relax=(relax,)), _third(pred, solver_type)]
        return tuple(block[p - 1] for p in _blocks(grid, order, lower_order_final, pred == "eps"))
    third = StepStrategy(order=3, pred=pred, relax=() if taylor else (None, second), noise=noise)
    rules = (first, middle, third)
    return tuple(rules[p - 1] for p in multistep_orders(grid, order, lower_order_final))


def multistep_orders(grid: TimeGrid, order: int, lower_order_final: bool) -> list[int]:
    """Orders that warm up with the history and, in short runs, fall again: 1 in the last step, at most 2 before it."""
    orders = [min(order, i + 1) for i in range(grid.n)]
    lowered = lower_order_final and grid.n < SHORT
    if lowered and grid.n > 1:
        orders[-2] = min(orders[-2], 2)
    if lowered or grid.to_zero:
        orders[-1] = 1
    return orders


def _third(pred: Literal["x0", "eps"], solver_type: str) -> StepStrategy:
    """The block's last step: "midpoint" uses its newest node alone, "heun" both."""
    if solver_type == "midpoint":
        return StepStrategy(order=2, pred=pred, start=-3, nodes=(-1,))
    return StepStrategy(order=3, pred=pred, start=-3)


def _blocks(grid: TimeGrid, order: int, lowered: bool, noise_form: bool) -> list[int]:
    """Orders within single-step blocks; where n is a multiple of the order, a lowered end starts a block of its own."""
    alone = int(noise_form and grid.from_pure_noise)
    whole, rest = divmod(grid.n - alone, order)
    orders = [1] * alone + list(range(1, order + 1)) * whole + list(range(1, rest + 1))
    if grid.to_zero or (lowered and rest == 0):
        orders[-1] = 1
    return orders

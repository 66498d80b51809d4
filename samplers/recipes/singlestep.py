"""Rules that evaluate the network inside a step: Heun, and DPM-Solver's single-step orders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..noise import NoiseSchedule
from ..strategy import Corrector, StepStrategy
from .dpmpp import taylor_steps
from .grids import TimeGrid


def heun(grid: TimeGrid) -> tuple[StepStrategy, ...]:
    r"""Heun (Karras et al. 2022, arXiv:2206.00364, algorithm 1): Euler, then the mean of both slopes.

    Order 2 in $\sigma/\alpha$ (flow: in t), two NFE a step; the second evaluation is made at the corrected state. The last
    step, and with an even NFE the one before it, is Euler; so is a step from alpha = 0.

    Args:
        grid: the times; `two_per_step` says how many.
    """
    flow = grid.noise.family == "flow"
    pred, axis = ("flow", "t") if flow else ("eps", "sigma")
    euler = StepStrategy(order=1, pred=pred, axis=axis)  # type: ignore[arg-type]
    corrected = StepStrategy(order=1, pred=pred, axis=axis, corr=Corrector(order=2, reeval=True))  # type: ignore[arg-type]
    first = int(grid.from_pure_noise and not flow)
    return tuple(corrected if first <= i < first + grid.nfe - grid.n else euler for i in range(grid.n))


def two_per_step(noise: NoiseSchedule, nfe: int, options: Mapping[str, Any]) -> int:
    """Steps that ``nfe`` evaluations make: two a step, one in the last, and one in the first where alpha is 0."""
    alone = noise.family == "vp" and bool(noise.alpha(noise.t_max) == 0)
    return min(nfe, (nfe + 3) // 2) if alone else nfe // 2 + 1


def dpm(
    grid: TimeGrid,
    *,
    order: int = 2,
    method: str = "singlestep",
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    tau: float = 0.0,
) -> tuple[StepStrategy, ...]:
    """DPM-Solver (Lu et al. 2022, arXiv:2206.00927): noise prediction, Taylor in lambda.

    One NFE a step of the grid; singlestep order p makes blocks of p steps, each restarting from its block's beginning.

    Args:
        grid: the times.
        order: 1..3.
        method: "singlestep" (the paper's) or "multistep".
        solver_type: "midpoint" or "heun".
        lower_order_final: lower the last steps' orders when n < 15.
        tau: noise of the SDE variant, multistep orders 1-2.

    Raises:
        ValueError: an argument outside the above.
    """
    return taylor_steps(
        grid, "dpm", "eps", order=order, method=method, solver_type=solver_type, lower_order_final=lower_order_final, tau=tau
    )

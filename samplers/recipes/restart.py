"""Restart sampling: go back to a noisier time and solve the interval again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..noise import NoiseSchedule
from ..strategy import Evaluation, StepStrategy
from .grids import LAMBDA_START, RHO, TimeGrid


def restart(
    grid: TimeGrid, *, order: int = 2, repeats: int = 1, inner: int = 3, low: float = 0.06, high: float = 0.3
) -> tuple[StepStrategy, ...]:
    r"""Restart (Xu et al. 2023, arXiv:2306.14878, algorithm 2) on DPM-Solver++ steps.

    When the main pass reaches noise level ``low``, noise takes the state back to ``high`` and ``inner`` steps solve the
    interval again, ``repeats`` times. Stochastic; one NFE a step, ``repeats * inner`` of them in the intervals. Meant for
    many steps (the paper uses 40 and more evaluations); with fewer than ``repeats * inner + 2`` the main pass takes them
    all. Where the grid has no time below ``high``, the interval keeps its ratio and moves up to the grid's nearest time.

    Args:
        grid: the times, with the jumps.
        order: of the multistep rule, 1 or 2; history starts anew after a jump.
        repeats: K of the paper.
        inner: evaluations per repeat.
        low: lower end of the interval, as sigma / alpha; the nearest time of the main grid is taken.
        high: upper end.

    Raises:
        ValueError: an argument outside the above.
    """
    if order not in (1, 2) or repeats < 1 or inner < 1 or not 0 < low < high:
        raise ValueError("restart needs order 1 or 2, repeats >= 1, inner >= 1 and 0 < low < high")
    steps, since = [], 0
    for i in range(grid.n):
        if not grid.falls(i):
            steps.append(StepStrategy(eval=Evaluation(source="none")))
            since = 0
            continue
        since += 1
        last = i == grid.n - 1 and grid.to_zero
        p = 1 if last else min(order, since)
        steps.append(StepStrategy(order=p, relax=("bh2",) if p == 2 else ()))
    return tuple(steps)


def restart_macro(noise: NoiseSchedule, nfe: int, options: Mapping[str, Any]) -> int:
    """Steps of the main pass."""
    main = nfe - options["repeats"] * options["inner"]
    return main if main >= 2 else nfe


def restart_expand(noise: NoiseSchedule, times: tuple[float, ...], nfe: int, options: Mapping[str, Any]) -> tuple[float, ...]:
    """Put the repeated intervals into the main pass's times."""
    if nfe == len(times) - 1:
        return times
    low, high, inner = options["low"], options["high"], options["inner"]
    levels = {i: noise.lam(t).neg().exp().item() for i, t in enumerate(times) if i > 0 and t > 0}
    at = min(levels, key=lambda i: abs(math.log(levels[i] / low)))
    top = high
    if levels[at] >= high:
        before = noise.lam(times[at - 1]).clamp(min=LAMBDA_START).neg().exp().item()
        top = min(levels[at] * high / low, (levels[at] * before) ** 0.5)
    start, end = top ** (1 / RHO), levels[at] ** (1 / RHO)
    ramp = [noise.t_of_lam(-RHO * math.log(start + (end - start) * k / inner)).item() for k in range(inner)]
    return (*times[: at + 1], *([*ramp, times[at]] * options["repeats"]), *times[at + 1 :])

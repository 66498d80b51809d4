"""DPM-Solver-v3 (Zheng et al. 2023, arXiv:2310.13268): multistep, expanding what the model's statistics choose."""

from __future__ import annotations

from ..strategy import Corrector, Nodes, StepStrategy
from .grids import TimeGrid


def dpm_v3(
    grid: TimeGrid,
    *,
    order: int = 3,
    pseudo: bool = False,
    corrector: str = "pseudo",
    half: bool = False,
    lower_order_final: bool = True,
) -> tuple[StepStrategy, ...]:
    """DPM-Solver-v3 (Zheng et al. 2023, arXiv:2310.13268): multistep, expanding what the model's statistics make smoothest.

    One NFE a step. Needs the model's `samplers.statistics.EmpiricalStatistics`, whose grid the run must stay within: it
    therefore ends at sigma_min, and a step from alpha = 0 or to sigma = 0 is a first-order data step instead.

    The published settings are ``pseudo=true,lower_order_final=false`` at 5 NFE and the defaults above; without corrector
    from about 10 NFE on; ``order=2,half=true`` under strong guidance. The pseudo corrector is second order whatever the
    predictor is.

    Args:
        grid: the times.
        order: 1..3.
        pseudo: estimate the first derivative from the latest node alone: second order, and steadier in very few steps.
        corrector: "pseudo" (one order above the predictor, its derivatives by divided differences as above), "taylor" (the
            predictor's order, full estimates) or "none".
        half: correct only in the noisier half of the time range, where t > t_max / 2.
        lower_order_final: let the order fall to 1 towards the end.

    Raises:
        ValueError: an argument outside the above.
    """
    if not 1 <= order <= 3:
        raise ValueError(f"dpm_v3: order must be 1..3, got {order}")
    if corrector not in ("pseudo", "taylor", "none"):
        raise ValueError(f"dpm_v3: unknown corrector {corrector!r}; known: pseudo, taylor, none")
    first = int(grid.from_pure_noise)  # the first node that v3 steps can use
    steps = []
    for i in range(grid.n):
        p = min(order, max(1, i + 1 - first))
        if lower_order_final:
            p = min(p, grid.n - i)
        if i < first or (grid.to_zero and i == grid.n - 1):
            steps.append(StepStrategy())
            continue
        corr = None
        q = p + 1 if corrector == "pseudo" else p
        ends_at = grid.times[i + 1]
        if corrector != "none" and q > 1 and i < grid.n - 1 and not (half and ends_at <= grid.noise.t_max / 2):
            corr = Corrector(order=q, d_nodes=_divided(q) if corrector == "pseudo" else ())
        steps.append(StepStrategy(order=p, pred="v3", d_nodes=_divided(p) if pseudo else (), corr=corr))
    return tuple(steps)


def _divided(order: int) -> tuple[Nodes, ...]:
    """Divided differences: the k-th derivative from the k latest nodes."""
    return tuple(range(1, order))

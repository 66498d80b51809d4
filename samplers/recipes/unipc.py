"""UniPC (Zhao et al. 2023, arXiv:2302.04867): a multistep predictor and a corrector that costs no evaluation."""

from __future__ import annotations

from ..strategy import Corrector, StepStrategy
from .grids import TimeGrid


def unipc(
    grid: TimeGrid,
    *,
    order: int = 2,
    variant: str = "bh2",
    pred: str = "x0",
    corrector: bool = True,
    lower_order_final: bool = True,
) -> tuple[StepStrategy, ...]:
    """UniPC (Zhao et al. 2023, arXiv:2302.04867): a multistep predictor and a corrector that costs no evaluation.

    One NFE a step. The predictor of order p is the Taylor step of order p; each predicted state is corrected by the step
    of order p + 1 that includes the new answer, except the last, whose answer would cost an evaluation. B(h) cancels from
    order 3 (corrector: 2) on, so ``variant`` only changes the low orders.

    Args:
        grid: the times.
        order: 1..4.
        variant: "bh1" (B(h) = h) or "bh2" (B(h) = e^h - 1).
        pred: "x0" (data prediction, UniPC's default) or "eps".
        corrector: apply UniC.
        lower_order_final: let the order fall to 1 towards the end.

    Raises:
        ValueError: an argument outside the above.
    """
    if not 1 <= order <= 4:
        raise ValueError(f"unipc: order must be 1..4, got {order}")
    if variant not in ("bh1", "bh2"):
        raise ValueError(f"unipc: unknown variant {variant!r}; known: bh1, bh2")
    if pred not in ("x0", "eps"):
        raise ValueError(f"unipc: unknown pred {pred!r}; known: x0, eps")
    steps = []
    for i in range(grid.n):
        p = min(order, i + 1)
        if lower_order_final:
            p = min(p, grid.n - i)
        if grid.to_zero and i == grid.n - 1:
            p = 1
        correct = corrector and i < grid.n - 1
        steps.append(
            StepStrategy(
                order=p,
                pred=pred,  # type: ignore[arg-type]  # checked above
                relax=(variant,) if p == 2 else (),  # type: ignore[arg-type]
                corr=Corrector(order=p + 1, relax=(variant,) if p == 1 else ()) if correct else None,  # type: ignore[arg-type]
            )
        )
    return tuple(steps)

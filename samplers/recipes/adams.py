"""Adams multistep rules on the noise prediction: DEIS, iPNDM, LMS; and SA-Solver on the SDE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..noise import NoiseSchedule
from ..strategy import Corrector, Noise, StepStrategy
from .dpmpp import multistep_orders
from .grids import TimeGrid


def deis(grid: TimeGrid, *, order: int = 2, axis: str = "lambda", lower_order_final: bool = True) -> tuple[StepStrategy, ...]:
    r"""DEIS (Zhang & Chen 2023, arXiv:2204.13902, eq. 14): the noise prediction's polynomial, integrated exactly.

    Order ``order``, one NFE a step.

    Args:
        grid: the times.
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
    orders = multistep_orders(grid, order, lower_order_final)
    return tuple(StepStrategy(order=p, pred="eps", axis=axis) for p in orders)  # type: ignore[arg-type]  # checked above


def ipndm(grid: TimeGrid, *, order: int = 4) -> tuple[StepStrategy, ...]:
    r"""iPNDM (Zhang & Chen 2023, arXiv:2204.13902, section 3.3): constant-step Adams-Bashforth weights in $\sigma/\alpha$.

    One NFE a step. It ignores the ratio of the steps, so it is of its order on grids even in sigma / alpha only; on others
    it is first order, yet often the best classic rule at few steps.

    Args:
        grid: the times.
        order: 1..4; the first steps use what history there is.

    Raises:
        ValueError: an order outside 1..4.
    """
    if not 1 <= order <= 4:
        raise ValueError(f"ipndm: order must be 1..4, got {order}")
    return tuple(StepStrategy(order=min(order, i + 1), pred="eps", axis="index") for i in range(grid.n))


def pndm(grid: TimeGrid, *, order: int = 4) -> tuple[StepStrategy, ...]:
    r"""PNDM (Liu et al. 2022, arXiv:2202.09778) with the linear multistep start (PLMS): iPNDM after a corrected first step.

    One NFE a step and one more in the first, which is redone with the mean of both noise predictions (from 3 NFE on);
    where alpha is 0 at first, the second step is. Like `ipndm` it ignores
    the ratio of the steps: of order ``order`` (2 at most after the first step's error) on grids even in sigma / alpha only.

    Args:
        grid: the times; `pndm_macro` says how many.
        order: 2..4; the first steps use what history there is.

    Raises:
        ValueError: an order outside 2..4.
    """
    if not 2 <= order <= 4:
        raise ValueError(f"pndm: order must be 2..4, got {order}")
    steps = list(ipndm(grid, order=order))
    if grid.nfe > grid.n:
        corrector = Corrector(order=2, reeval=True)
        steps[int(grid.from_pure_noise)] = StepStrategy(order=1, pred="eps", axis="index", corr=corrector)
    return tuple(steps)


def pndm_macro(noise: NoiseSchedule, nfe: int, options: Mapping[str, Any]) -> int:
    """Steps of the grid: from three evaluations on (four where alpha is 0 at first), one is for the second look."""
    return nfe if nfe < 3 + bool(noise.alpha(noise.t_max) == 0) else nfe - 1


def lms(grid: TimeGrid, *, order: int = 4) -> tuple[StepStrategy, ...]:
    r"""Linear multistep (k-diffusion's lms): variable-step Adams-Bashforth of the noise prediction in $\sigma/\alpha$.

    Order ``order``, one NFE a step; for flow models on the velocity in t. DEIS's rhoAB without lower orders at the end
    (arXiv:2204.13902), and what iPNDM is with the right weights on uneven grids.

    Args:
        grid: the times.
        order: 1..4.

    Raises:
        ValueError: an order outside 1..4.
    """
    if not 1 <= order <= 4:
        raise ValueError(f"lms: order must be 1..4, got {order}")
    pred, axis = ("flow", "t") if grid.noise.family == "flow" else ("eps", "sigma")
    return tuple(StepStrategy(order=min(order, i + 1), pred=pred, axis=axis) for i in range(grid.n))  # type: ignore[arg-type]


def sa_solver(
    grid: TimeGrid,
    *,
    order: int = 2,
    corrector: int = 2,
    tau: float = 1.0,
    low: float = 0.2,
    high: float = 0.8,
    lower_order_final: bool = True,
) -> tuple[StepStrategy, ...]:
    r"""SA-Solver (Xue et al. 2023, arXiv:2309.05019): stochastic Adams predictor and corrector on the x0-prediction.

    Order ``order`` for tau = 0; one NFE a step. Order-2 steps use h^2 / 2 as coefficient and the run ends at sigma_min, as in
    the published code.

    Args:
        grid: the times.
        order: of the predictor, 1..4.
        corrector: order of the corrector, 2..4; 0 for none.
        tau: noise level; 0 is the ODE.
        low: noise is added where the step starts at low <= t / t_max <= high (training steps for discrete schedules).
        high: see above.
        lower_order_final: let the orders fall towards the end.

    Raises:
        ValueError: an argument outside the above.
    """
    if not 1 <= order <= 4 or corrector not in (0, 2, 3, 4):
        raise ValueError(f"sa_solver: order must be 1..4 and corrector 0, 2, 3 or 4, got {order} and {corrector}")
    if not tau >= 0:
        raise ValueError(f"sa_solver: tau must be >= 0, got {tau}")
    discrete = grid.noise.family == "vp" and grid.noise.kind != "vp_trig"
    top = grid.noise.timestep(grid.noise.t_max).item() + 1 if discrete else grid.noise.t_max
    steps = []
    for i in range(grid.n):
        place = grid.noise.timestep(grid.times[i]).item() if discrete else grid.times[i]
        noise = Noise(kind="tau", amount=tau) if tau and low <= place / top <= high else None
        p, c = min(order, i + 1), min(corrector, i + 2)
        if lower_order_final:
            p, c = min(p, grid.n - i), min(c, grid.n - i + 1)
        if i == grid.n - 1:
            p, c = (1 if grid.to_zero else p), 0
        corr = Corrector(order=c, relax=("bh1",) if c == 2 else ()) if c >= 2 else None
        steps.append(StepStrategy(order=p, relax=("bh1",) if p == 2 else (), noise=noise, corr=corr))
    return tuple(steps)

"""Rules that take the whole step with the prediction at its middle: DPM-Solver-2, DPM-Solver++(2S), with and without noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from torch import Tensor

from ..noise import NoiseSchedule
from ..phi import phi
from ..strategy import Evaluation, Noise, Residual, StepStrategy
from .grids import TimeGrid, lambda_between


def kdpm2(grid: TimeGrid, *, pred: str = "eps", eta: float = 0.0, s_noise: float = 1.0) -> tuple[StepStrategy, ...]:
    r"""DPM-Solver-2 (Lu et al. 2022, arXiv:2206.00927, algorithm 1) as k-diffusion's dpm_2: midpoint in $\log(\sigma/\alpha)$.

    Order 2 for eta = 0, two NFE a step: an Euler step to the middle, then the whole step with the middle's prediction alone.
    The step to sigma = 0, and with an even NFE the one before it, is Euler; so is a step from alpha = 0. With eta, the
    steps of two evaluations go to a lower level and noise takes them back up, as in ancestral sampling.

    Args:
        grid: the times, midpoints included.
        pred: "eps", or "x0" for DPM-Solver++(2S) (arXiv:2211.01095, algorithm 1).
        eta: share of the ancestral noise, in [0, 1].
        s_noise: multiplies the noise.

    Raises:
        ValueError: an argument outside the above.
    """
    if pred not in ("eps", "x0"):
        raise ValueError(f"kdpm2: unknown pred {pred!r}; known: eps, x0")
    _check_eta("kdpm2", eta)
    first = StepStrategy(order=1, pred=pred)  # type: ignore[arg-type]  # checked above
    second = StepStrategy(order=2, pred=pred, start=-2, relax=("bh2",))  # type: ignore[arg-type]
    if eta:
        steps: list[StepStrategy] = []
        while (i := len(steps)) < grid.n:
            doubled = i + 2 < grid.n and grid.falls(i + 1) and not grid.falls(i + 2)
            steps += [first, second, _back(s_noise)] if doubled else [first]
        return tuple(steps)
    alone = int(grid.from_pure_noise and grid.n > 1)
    pairs = (grid.n - 1 - alone) // 2
    return (first,) * alone + (first, second) * pairs + (first,) * (grid.n - alone - 2 * pairs)


def midpoint_per_step(noise: NoiseSchedule, nfe: int, options: Mapping[str, Any]) -> int:
    """Steps that ``nfe`` evaluations make: two a step, one in the last, and one in the first where alpha is 0."""
    return min(nfe, (nfe + 3) // 2) if bool(noise.alpha(noise.t_max) == 0) else nfe // 2 + 1


def kdpm2_expand(noise: NoiseSchedule, times: tuple[float, ...], nfe: int, options: Mapping[str, Any]) -> tuple[float, ...]:
    """Put in the midpoints, as many as the evaluations allow and earliest steps first, and with eta the levels below."""
    out = [times[0]]
    for i, (t, s) in enumerate(pairwise(times)):
        if _doubled(noise, times, nfe, i):
            below = _below(noise, t, s, options["eta"])
            out.append(lambda_between(noise, t, below, 0.5))
            out += [] if below == s else [below]
        out.append(s)
    return tuple(out)


def dpmpp_sde(grid: TimeGrid, *, eta: float = 1.0, s_noise: float = 1.0) -> tuple[StepStrategy, ...]:
    r"""DPM-Solver++ SDE (k-diffusion's dpmpp_sde at r = 1/2): noise at the midpoint and at the end, midpoint x0-prediction.

    Stochastic, two NFE a step. From the step's start the state goes, with ancestral noise, to the middle in $\lambda$; the
    prediction there then takes the start to the level below the step's end, and noise back up. Both noises are increments of
    one Brownian path in sigma / alpha, so the second contains the first. The step to sigma = 0, and
    with an even NFE the one before it, is Euler; so is a step from alpha = 0.

    Args:
        grid: the times, with the middles and the levels below.
        eta: share of the ancestral noise, in (0, 1].
        s_noise: multiplies the noise.

    Raises:
        ValueError: an argument outside the above.
    """
    if not eta:
        raise ValueError("dpmpp_sde: eta must be in (0, 1]; without noise it is kdpm2:pred=x0")
    _check_eta("dpmpp_sde", eta)
    euler = StepStrategy(order=1)
    steps: list[StepStrategy] = []
    while (i := len(steps)) < grid.n:
        if i + 1 == grid.n or grid.falls(i + 1):
            steps.append(euler)
        else:  # start, below the middle, middle, below the end, end
            shared, again = _shared_noise(grid, i)
            delta = Residual(x=(*[0.0] * (i + 1), *again))
            whole = StepStrategy(order=2, start=-3, relax=(_all_on_middle(grid, i),), delta=delta)
            steps += [euler, _back(s_noise), whole, _back(s_noise * (1 - shared**2) ** 0.5)]
    return tuple(steps)


def dpmpp_sde_expand(noise: NoiseSchedule, times: tuple[float, ...], nfe: int, options: Mapping[str, Any]) -> tuple[float, ...]:
    """Put in the middles and the levels below them and below the ends."""
    out = [times[0]]
    for i, (t, s) in enumerate(pairwise(times)):
        if _doubled(noise, times, nfe, i):
            middle = lambda_between(noise, t, s, 0.5)
            out += [_below(noise, t, middle, options["eta"]), middle, _below(noise, t, s, options["eta"])]
        out.append(s)
    return tuple(out)


def _all_on_middle(grid: TimeGrid, i: int) -> float:
    """The relaxation r (factor 1 + r h) with which the step's whole weight falls on the prediction at the middle."""
    start, middle, end = (grid.noise.lam(grid.times[j]).item() for j in (i, i + 2, i + 3))
    h = end - start
    return (float(phi(1, -h) / phi(2, -h)) * (middle - start) / h - 1.0) / h


def _shared_noise(grid: TimeGrid, i: int) -> tuple[float, tuple[float, float]]:
    """How the step's two noises are correlated, and what carries the first one over.

    The increments from the start to the middle and from the start to the end overlap. The first is what the middle's state has
    more than the level below it, so the second's share of it is a weight on these two states.
    """
    below, middle, under, end = (grid.noise.alpha_sigma(grid.times[j]) for j in range(i + 1, i + 5))
    start, at, to = (grid.noise.lam(grid.times[j]).neg().exp().item() for j in (i, i + 2, i + 4))
    shared = ((start - at) / (start - to)) ** 0.5
    (up, first), (back, second) = _noise_up(below, middle), _noise_up(under, end)
    weight = shared * second / (back * first)
    return shared, (-up * weight, weight)


def _noise_up(low: tuple[Tensor, Tensor], high: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """What the forward process from one time to a noisier one multiplies the state and the noise by."""
    ratio = (high[0] / low[0]).item()
    return ratio, (high[1].item() ** 2 - (ratio * low[1].item()) ** 2) ** 0.5


def _doubled(noise: NoiseSchedule, times: tuple[float, ...], nfe: int, i: int) -> bool:
    """Whether step i of the grid has two evaluations."""
    alone = int(bool(noise.alpha(times[0]) == 0))
    return alone <= i < alone + nfe - (len(times) - 1)


def _below(noise: NoiseSchedule, t: float, s: float, eta: float) -> float:
    r"""The time from which ancestral noise leads up to s: level $\sqrt{1 - \eta^2 (1 - s^2/t^2)}\, s$ in $\sigma/\alpha$."""
    if not eta:
        return s
    gap = 2 * (noise.lam(t) - noise.lam(s)).item()
    return noise.t_of_lam(noise.lam(s).item() - 0.5 * math.log(1 - eta**2 * -math.expm1(gap))).item()


def _back(s_noise: float) -> StepStrategy:
    """Noise up to the step's end."""
    return StepStrategy(eval=Evaluation(source="none"), noise=None if s_noise == 1.0 else Noise(scale=s_noise))


def _check_eta(name: str, eta: float) -> None:
    if not 0 <= eta <= 1:
        raise ValueError(f"{name}: eta must be in [0, 1], got {eta}")

"""A step of order p is exact when what it expands is a polynomial of degree p - 1 in its axis.

The exact solution is integrated by other means than the tableau's: 80-point Gauss-Legendre quadrature of the kernel.
"""

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from samplers import Corrector, NoiseSchedule, StepStrategy
from samplers.testing import local_errors

NOISE = {
    "vp": NoiseSchedule.vp_linear(),
    "cosine": NoiseSchedule.vp_cosine(),
    "edm": NoiseSchedule.edm(),
    "flow": NoiseSchedule.flow(),
}
ALL = pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)
ORDERS = pytest.mark.parametrize("order", [1, 2, 3, 4])
RATIOS = (0.7, 1.6, 1.1)
COEFFICIENTS = (0.7, -1.3, 0.9, 0.4, -0.6)
POINTS, WEIGHTS = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(80))


class PolynomialFlow:
    """``pred`` of the network is a polynomial of the given degree in ``axis``; r, l as in (l, r) prediction."""

    def __init__(self, noise: NoiseSchedule, degree: int, axis: str, l: float, r: float) -> None:
        self.noise, self.axis, self.l, self.r = noise, axis, l, r
        self.coefficients = COEFFICIENTS[: degree + 1]

    def expanded(self, lam: Tensor) -> Tensor:
        u = {"lambda": lam, "sigma": torch.exp(-lam)}.get(self.axis)
        u = self.noise.t_of_lam(lam) if u is None else u
        return sum(c * (u / 2) ** k for k, c in enumerate(self.coefficients))

    def start(self, t: Tensor) -> Tensor:
        return torch.tensor([[0.3, -1.2], [2.0, 0.1]], dtype=torch.float64)

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        # y = x / alpha obeys dy/dlambda = x0 - y = -l y + e^(r lambda) P(lambda)
        lam, y = self.noise.lam(t), x / self.noise.alpha(t)
        return (1 - self.l) * y + torch.exp(self.r * lam) * self.expanded(lam)

    def solve(self, x: Tensor, t: Tensor, to: Tensor) -> Tensor:
        low, high = self.noise.lam(t), self.noise.lam(to)
        u = low + (high - low) * (POINTS + 1) / 2
        integral = (WEIGHTS * torch.exp((self.l + self.r) * u) * self.expanded(u)).sum() * (high - low) / 2
        y = x / self.noise.alpha(t)
        return self.noise.alpha(to) * torch.exp(-self.l * high) * (torch.exp(self.l * low) * y + integral)


PREDICTIONS = {"x0": (1.0, 0.0), "eps": (0.0, -1.0), (0.4, -0.2): (0.4, -0.2), (1.3, 0.5): (1.3, 0.5)}


def _steps(order: int, **options) -> list[StepStrategy]:
    return [StepStrategy()] * (order - 1) + [StepStrategy(order=order, **options)]


def _error(noise: NoiseSchedule, steps: list[StepStrategy], degree: int, width: float = 0.5) -> float:
    step = steps[-1]
    l, r = PREDICTIONS[step.pred]
    flow = PolynomialFlow(noise, degree, step.axis, l, r)
    return local_errors(steps, noise, (width,), flow=flow, ratios=RATIOS)[0]


@ALL
@ORDERS
@pytest.mark.parametrize("pred", PREDICTIONS, ids=str)
@pytest.mark.parametrize("width", [0.5, 0.004])
def test_exact_in_lambda(noise: NoiseSchedule, order: int, pred, width: float) -> None:
    assert _error(noise, _steps(order, pred=pred), order - 1, width) < 1e-11


@ALL
@ORDERS
@pytest.mark.parametrize("pred", ["x0", "eps"])
@pytest.mark.parametrize("axis", ["sigma", "t"])
def test_exact_on_other_axes(noise: NoiseSchedule, order: int, pred: str, axis: str) -> None:
    assert _error(noise, _steps(order, pred=pred, axis=axis), order - 1) < 1e-10


@ORDERS
@pytest.mark.parametrize(("pred", "axis"), [("x0", "lambda"), ("eps", "lambda"), ("eps", "sigma"), ("x0", "t")])
def test_not_exact_for_one_degree_more(order: int, pred: str, axis: str) -> None:
    assert _error(NOISE["vp"], _steps(order, pred=pred, axis=axis), order) > 1e-6


@ORDERS
@pytest.mark.parametrize("pred", PREDICTIONS, ids=str)
def test_correctors_are_exact_for_one_degree_more(order: int, pred) -> None:
    steps = _steps(order, pred=pred, corr=Corrector(order=order + 1))
    assert _error(NOISE["vp"], steps, order) < 1e-11


@pytest.mark.parametrize("start", [-1, -2, -3])
@pytest.mark.parametrize("nodes", [None, (-1, -2), (-4, -1), (-2, -3, -4)])
def test_exact_from_any_start_with_any_nodes(start: int, nodes: tuple[int, ...] | None) -> None:
    if nodes is not None:
        nodes = tuple(n for n in nodes if n != start)
    degree = 2 if nodes is None else len(nodes)
    steps = [StepStrategy()] * 3 + [StepStrategy(order=degree + 1, start=start, nodes=nodes)]
    assert _error(NOISE["vp"], steps, degree) < 1e-11


def test_a_named_subset_estimates_its_derivative_exactly() -> None:
    full = StepStrategy(order=3, d_nodes=((-2, -4), (-3, -4)))
    assert _error(NOISE["vp"], [StepStrategy()] * 3 + [full], 2) < 1e-11
    low = msgspec.structs.replace(full, d_nodes=(1,))
    assert _error(NOISE["vp"], [StepStrategy()] * 3 + [low], 1) < 1e-11
    assert _error(NOISE["vp"], [StepStrategy()] * 3 + [low], 2) > 1e-3


class SigmaFlow(PolynomialFlow):
    """The noise prediction is a polynomial in sigma / alpha, undamped (the grid is relative to it)."""

    def __init__(self, noise: NoiseSchedule, degree: int) -> None:
        super().__init__(noise, degree, "sigma", 0.0, -1.0)

    def expanded(self, lam: Tensor) -> Tensor:
        return sum(c * torch.exp(-k * lam) for k, c in enumerate(self.coefficients))


@ALL
@ORDERS
def test_index_axis_is_exact_on_grids_even_in_sigma(noise: NoiseSchedule, order: int) -> None:
    steps = _steps(order, pred="eps", axis="index")
    assert local_errors(steps, noise, (0.2,), flow=SigmaFlow(noise, order - 1), grid="sigma")[0] < 1e-11


@ORDERS
def test_index_axis_is_not_exact_on_other_grids(order: int) -> None:
    steps = _steps(order, pred="eps", axis="index")
    error = local_errors(steps, NOISE["vp"], (0.2,), flow=SigmaFlow(NOISE["vp"], order - 1), grid="sigma", ratios=RATIOS)[0]
    assert (error < 1e-11) == (order == 1)

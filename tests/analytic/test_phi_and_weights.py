"""The arithmetic under every step: phi functions, derivative weights, quadrature."""

import itertools
import math
from fractions import Fraction

import pytest
import torch

from samplers import Corrector, SolverSchedule, StepStrategy
from samplers.phi import GAUSS_LEGENDRE, derivative_weights, phi, psi

SMALL = (1e-12, 1e-8, 1e-5, 1e-3, 9.9e-3, 1.01e-2, 0.1, 0.5, 0.99, 1.0, 1.01, 2.5, 6.0, 12.0)
NODES = [(-1.0,), (-0.7, -1.9), (0.6, -1.3), (-0.5, -1.4, -2.0), (0.9, -0.3, -1.7), (0.8, -0.4, -1.1, -2.6)]


def _phi_exactly(k: int, z: float, terms: int = 120) -> float:
    """The series in rational arithmetic: no rounding before the last conversion."""
    exact, total, power = Fraction(z), Fraction(0), Fraction(1)
    for j in range(terms):
        total += power / math.factorial(j + k)
        power *= exact
    return float(total)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("z", [sign * z for z in SMALL for sign in (1, -1)])
def test_phi_is_the_series(k: int, z: float) -> None:
    assert phi(k, z) == pytest.approx(_phi_exactly(k, z), rel=2e-12)
    assert phi(k, torch.tensor(z, dtype=torch.float64)).item() == pytest.approx(phi(k, z), rel=1e-13)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_phi_at_zero(k: int) -> None:
    assert phi(k, 0.0) == 1 / math.factorial(k)


@pytest.mark.parametrize("z", [-3.0, -0.2, 0.4, 5.0])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_phi_recurrence_and_psi(k: int, z: float) -> None:
    assert phi(k + 1, z) * z == pytest.approx(phi(k, z) - 1 / math.factorial(k), rel=1e-11)
    assert psi(k, z) == pytest.approx(math.exp(z) * _phi_exactly(k, -z), rel=1e-11)


@pytest.mark.parametrize("z", [-2.0, -0.3, 0.7, 3.0])
def test_phi_is_differentiable(z: float) -> None:
    for k in (1, 2, 3, 4):
        assert torch.autograd.gradcheck(lambda v, k=k: phi(k, v), torch.tensor(z, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("delta", NODES)
def test_weights_meet_the_moment_conditions(delta: tuple[float, ...]) -> None:
    for k in range(1, len(delta) + 1):
        weights = derivative_weights(list(delta), k)
        for i in range(1, len(delta) + 1):
            moment = sum(w * d**i for w, d in zip(weights, delta, strict=True)) / math.factorial(i)
            assert moment == pytest.approx(1.0 if i == k else 0.0, abs=1e-12)


@pytest.mark.parametrize("delta", NODES)
def test_weights_differentiate_polynomials_exactly(delta: tuple[float, ...]) -> None:
    m, centre = len(delta), 0.4
    for degree, k in itertools.product(range(m + 1), range(1, m + 1)):
        # (centre + u)^degree: its k-th derivative at u = 0
        exact = math.perm(degree, k) * centre ** (degree - k) if k <= degree else 0.0
        estimate = sum(
            w * ((centre + d) ** degree - centre**degree)
            for w, d in zip(derivative_weights(list(delta), k), delta, strict=True)
        )
        assert estimate == pytest.approx(exact, abs=1e-11)


def test_weights_of_known_differences() -> None:
    assert derivative_weights([-1.0], 1) == pytest.approx([-1.0])
    assert derivative_weights([-1.0, -2.0], 1) == pytest.approx([-2.0, 0.5])
    assert derivative_weights([-1.0, -2.0], 2) == pytest.approx([-2.0, 1.0])
    assert derivative_weights([1.0, -1.0], 2) == pytest.approx([1.0, 1.0])


def test_more_nodes_than_the_derivative_needs_are_all_used() -> None:
    values = [math.sin(d) - math.sin(0.0) for d in (-0.1, -0.2, -0.3)]
    two = sum(w * v for w, v in zip(derivative_weights([-0.1, -0.2], 1), values[:2], strict=True))
    three = sum(w * v for w, v in zip(derivative_weights([-0.1, -0.2, -0.3], 1), values, strict=True))
    assert abs(three - 1) < abs(two - 1) / 5


def test_quadrature_is_exact_to_degree_23() -> None:
    nodes = [x for x, _ in GAUSS_LEGENDRE]
    assert nodes == sorted(nodes)
    for degree in range(24):
        assert sum(w * x**degree for x, w in GAUSS_LEGENDRE) == pytest.approx(1 / (degree + 1), rel=1e-13)


def test_stencils_name_the_latest_nodes() -> None:
    steps = (StepStrategy(), StepStrategy(), StepStrategy(), StepStrategy(order=4, d_nodes=(1, (-4, -2))))
    stencil = SolverSchedule(times=(1.0, 0.8, 0.6, 0.4, 0.2), steps=steps).stencil(3)
    assert stencil.start == 3
    assert [nodes for nodes, _ in stencil.derivatives] == [(2,), (0, 2), (2, 1, 0)]


def test_the_number_of_nodes_counts_the_latest_of_them_in_any_order() -> None:
    steps = (StepStrategy(), StepStrategy(), StepStrategy(order=3, nodes=(-3, -2), d_nodes=(1,)))
    stencil = SolverSchedule(times=(1.0, 0.8, 0.6, 0.4), steps=steps).stencil(2)
    assert stencil.derivatives[0] == ((1,), None)
    assert set(stencil.derivatives[1][0]) == {0, 1}


def test_stencils_of_restarts_and_correctors() -> None:
    steps = (
        StepStrategy(),
        StepStrategy(order=2, start=-2, corr=Corrector(order=3)),
        StepStrategy(order=2, nodes=(-3,), corr=Corrector(order=3)),
        StepStrategy(corr=Corrector(order=2, nodes=(-3,))),
        StepStrategy(),
    )
    schedule = SolverSchedule(times=(1.0, 0.8, 0.6, 0.4, 0.2, 0.1), steps=steps)
    assert schedule.stencil(1).start == 0
    assert schedule.stencil(1).derivatives == (((1,), None),)
    assert schedule.corrector_stencil(1).start == 0
    assert schedule.corrector_stencil(1).derivatives == (((2, 1), None),) * 2
    assert schedule.stencil(2).derivatives == (((0,), None),)
    assert schedule.corrector_stencil(2).derivatives == (((3, 0), None),) * 2
    assert schedule.corrector_stencil(3).derivatives == (((2,), None),)

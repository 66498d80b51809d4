"""Grids that are computed: GITS by dynamic programming, DMN by minimising an error bound, AMED's midpoints."""

from __future__ import annotations

import math
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from samplers import NoiseSchedule, SolverSchedule, recipe, sample
from samplers.denoisers import GaussianMixture
from samplers.peers import Midpoint, Trajectory, amed, cheapest_path, from_midpoints, gits, gits_cost, teacher_trajectory
from samplers.recipes.optimised import error_bound, optimal_lambdas, step_orders, step_weights

VP, EDM, FLOW = NoiseSchedule.vp_linear(), NoiseSchedule.edm(), NoiseSchedule.flow()


@pytest.fixture(scope="module")
def law() -> GaussianMixture:
    g = torch.Generator().manual_seed(7)
    return GaussianMixture(1.5 * torch.randn(5, 8, generator=g), 0.1 + 0.3 * torch.rand(5, generator=g))


def noises(noise: NoiseSchedule, n: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 8, generator=g, dtype=torch.float64) * noise.sigma(noise.t_max)


@pytest.mark.parametrize("coefficient", [0.8, 1.0, 1.15])
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_the_path_is_the_cheapest_of_all(steps: int, coefficient: float) -> None:
    cost = torch.rand(9, 9, generator=torch.Generator().manual_seed(steps), dtype=torch.float64)
    found = cheapest_path(cost, steps, coefficient)

    def price(path: tuple[int, ...]) -> float:
        return sum(coefficient**k * float(cost[i, j]) for k, (i, j) in enumerate(pairwise(path)))

    every = [(0, *inner, 8) for inner in combinations(range(1, 8), steps - 1)]
    assert price(found) == pytest.approx(min(map(price, every)), abs=1e-14)
    assert len(found) == steps + 1


def test_paths_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match=r"1\.\.8 steps, got 9"):
        cheapest_path(torch.zeros(9, 9), 9)
    with pytest.raises(ValueError, match="coefficient"):
        cheapest_path(torch.zeros(9, 9), 3, 0.0)


def test_costs_of_a_trajectory_written_down() -> None:
    """A right angle in the plane: one Euler step over the corner misses by the second leg."""
    states = torch.tensor([[[0.0, 0.0]], [[1.0, 0.0]], [[1.0, 1.0]]])
    slopes = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    corner = Trajectory((2.0, 1.0, 0.0), torch.tensor([0.0, 1.0, 2.0]), states, slopes)
    for metric in ("l1", "l2"):
        cost = gits_cost(corner, metric)
        assert cost[0].tolist() == [math.inf, 0.0, pytest.approx(math.hypot(1, 1) if metric == "l2" else 2.0)]
        assert cost[1].tolist() == [math.inf, math.inf, 0.0]
    # (2, 0) lies sqrt(2) away from the diagonal; the teacher's end lies on it, its corner sqrt(1/2) away.
    deviation = gits_cost(corner, "dev")
    assert deviation[0, 2] == pytest.approx(math.sqrt(2))
    assert deviation[0, 1] == pytest.approx(0.0)
    with pytest.raises(ValueError, match="unknown metric 'l3'; known: dev, l1, l2"):
        gits_cost(corner, "l3")


@pytest.mark.parametrize("noise", [VP, EDM, FLOW], ids=lambda noise: noise.kind)
def test_slopes_are_the_exact_ones(law: GaussianMixture, noise: NoiseSchedule) -> None:
    denoiser = law.denoiser(noise)
    run = teacher_trajectory(denoiser, noises(noise, 4, 0), noise, steps=20)
    for i in (0, 7, 19):
        alpha, sigma = noise.alpha_sigma(run.times[i])
        x = run.states[i] * (1.0 if noise is FLOW else alpha)
        x0 = denoiser(x, torch.tensor(run.times[i], dtype=torch.float64))
        slope = (x - x0) / run.times[i] if noise is FLOW else (x - alpha * x0) / sigma
        torch.testing.assert_close(run.slopes[i], slope, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("noise", [VP, EDM, FLOW], ids=lambda noise: noise.kind)
def test_the_grid_is_a_cheapest_choice_of_the_teachers_times(law: GaussianMixture, noise: NoiseSchedule) -> None:
    """Cheaper in the sense of its own cost than every even choice of the teacher's times."""
    denoiser, x = law.denoiser(noise), noises(noise, 64, 2)
    run = teacher_trajectory(denoiser, x, noise)
    schedule = gits("ipndm", denoiser, noise, x, 6, metric="l2", trajectory=run)
    assert (schedule.nfe, schedule.times[0], schedule.times[-1]) == (6, noise.t_max, 0.0)
    path = [run.times.index(t) for t in (*schedule.times[:-1], run.times[-1])]
    cost = gits_cost(run, "l2")

    def price(path: list[int]) -> float:
        return sum(1.15**k * float(cost[i, j]) for k, (i, j) in enumerate(pairwise(path)))

    assert price(path) < 0.95 * price(list(range(0, 61, 10)))
    kept = gits("ipndm:final=sigma_min", denoiser, noise, x, 6, metric="l2", trajectory=run)
    assert kept.times == (*schedule.times[:-1], noise.t_min)
    assert kept.provenance == {"grid": "gits", "metric": "l2", "coefficient": 1.15, "teacher_steps": 60, "noises": 64}


def test_teachers_that_do_not_fit_are_refused(law: GaussianMixture) -> None:
    for text in ("heun", "unipc", "ddpm"):
        with pytest.raises(ValueError, match="the teacher must be deterministic"):
            teacher_trajectory(law.denoiser(VP), noises(VP, 2, 0), VP, text, 9)
    cosine = NoiseSchedule.vp_cosine()
    with pytest.raises(ValueError, match="alpha is 0 at t = 1"):
        teacher_trajectory(law.denoiser(cosine), noises(cosine, 2, 0), cosine)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_weights_are_integrals_of_the_lagrange_basis(order: int) -> None:
    lam = np.array([-3.0, -1.2, -0.4, 0.7, 1.1])
    weights = step_weights(lam, order, np.array([2, 3]))
    for column, s in enumerate((2, 3)):
        for back in range(order):
            others = [lam[s - other] for other in range(order) if other != back]

            def integrand(u: float, s: int = s, back: int = back, others: list[float] = others) -> float:
                return math.exp(u - lam[s]) * math.prod((u - other) / (lam[s - back] - other) for other in others)

            assert weights[back, column] == pytest.approx(quad(integrand, lam[s], lam[s + 1])[0], rel=1e-10)


def test_the_bound_is_the_papers() -> None:
    """Start-up steps one by one; from the third on, every node's signed weights."""
    lam = np.array([-4.0, -2.5, -1.0, 0.2, 1.5, 2.0, 4.0])
    assert step_orders(6) == [1, 2, 3, 3, 2, 1]
    error = [math.exp(-(max(0, 2 * v) + math.log1p(math.exp(-abs(2 * v))))) * math.sqrt(1 + math.exp(-2 * v)) for v in lam]
    per_node, total = [0.0] * 6, 0.0
    for s, order in enumerate(step_orders(6)):
        own = step_weights(lam, order, np.array([s]))[:, 0] * math.exp(lam[s])
        if s < 3:
            total += math.sqrt(sum((own[back] * error[s - back]) ** 2 for back in range(order)))
        else:
            for back in range(order):
                per_node[s - back] += own[back] * error[s - back]
    assert error_bound(lam) == pytest.approx(total + sum(map(abs, per_node)), rel=1e-12)


def test_the_grid_minimises_the_bound() -> None:
    low, high = -5.0, 4.5
    fine = np.linspace(low, high, 1902)[1:-1]
    assert error_bound(optimal_lambdas(low, high, 2)) <= min(error_bound([low, v, high]) for v in fine) * (1 + 1e-6)
    coarse = np.linspace(low, high, 48)[1:-1]
    best = min(error_bound([low, a, b, high]) for a, b in combinations(coarse, 2))
    assert error_bound(optimal_lambdas(low, high, 3)) <= best * (1 + 1e-3)
    assert error_bound(optimal_lambdas(low, high, 8)) < 0.5 * error_bound(np.linspace(low, high, 9))


@pytest.mark.slow
def test_many_steps_interpolate_the_optimum_of_twenty() -> None:
    grid = optimal_lambdas(-5.0, 4.5, 30)
    assert (grid[0], grid[-1], len(grid)) == (-5.0, 4.5, 31)
    assert all(b > a for a, b in pairwise(grid))
    assert grid[3::3] == pytest.approx(optimal_lambdas(-5.0, 4.5, 20)[2::2], abs=1e-12)


def test_the_grid_has_a_name() -> None:
    for noise in (VP, EDM, FLOW, NoiseSchedule.vp_cosine()):
        times = recipe("unipc:order=3,grid=dmn", noise, 6).times
        assert (times[0], times[-1], len(times)) == (noise.t_max, 0.0, 7)


def test_amed_midpoints_beat_the_fixed_one_on_other_noises(law: GaussianMixture) -> None:
    levels = [(80 ** (1 / 7) + k / 3 * (0.05 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for k in range(4)]
    denoiser, x = law.denoiser(EDM), noises(EDM, 128, 4)
    schedule = amed(denoiser, EDM, noises(EDM, 64, 3), levels)
    assert schedule.nfe == 6
    fine = recipe("dpmpp:order=3,taylor=true,grid=lambda", EDM, 300)
    fine = SolverSchedule(
        times=(*[t for t in fine.times if t > levels[-1]], levels[-1]),
        steps=fine.steps[: sum(t > levels[-1] for t in fine.times)],
    )
    truth = sample(denoiser, x, fine, EDM)

    def error(schedule: SolverSchedule) -> float:
        return float((sample(denoiser, x, schedule, EDM) - truth).square().mean().sqrt())

    assert error(schedule) < 0.8 * error(from_midpoints(EDM, levels, [[Midpoint(0.5)]] * 3))

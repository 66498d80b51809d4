"""Refinement: its derivatives against automatic ones, what it costs, and how far it gets where the answer is known."""

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import jacobian

from samplers import NoiseSchedule, Residual, SolverSchedule, recipe, sample
from samplers.denoisers import GaussianMixture
from samplers.engine import Denoiser
from search import PENALTY, Objective, SearchSpace
from search.genes import Genes
from search.refine import evaluations_per_round, refine
from search.residuals import Residuals

NOISE = NoiseSchedule.vp_linear()


def _denoiser() -> Denoiser:
    g = torch.Generator().manual_seed(3)
    factors = torch.randn(3, 4, 4, generator=g, dtype=torch.float64)
    means = torch.randn(3, 4, generator=g, dtype=torch.float64)
    return GaussianMixture(means, covariances=factors @ factors.mT / 8).denoiser(NOISE)


def _objective(n: int, seed: int, denoiser: Denoiser | None = None, dtype: torch.dtype = torch.float64) -> Objective:
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return Objective.endpoint(denoiser or _denoiser(), NOISE, x, reference_nfe=100)


STARTS = ("deis:order=2,grid=lambda", "unipc:order=3,grid=karras", "dpm:order=2", "dpmpp:order=2,afs=zero_x0", "heun")


@pytest.mark.parametrize("final", ["zero", "t_min"])
@pytest.mark.parametrize("text", STARTS)
def test_derivatives(text: str, final: str) -> None:
    """Of every sample in every number, though most evaluations are shared, and from numbers that are not zero."""
    space = SearchSpace(NOISE, 6, final_time=0.0 if final == "zero" else NOISE.t_min)
    start = space.adopt(recipe(text, NOISE, 6))
    objective = Objective.endpoint(
        _denoiser(), NOISE, torch.randn(5, 4, dtype=torch.float64), reference_nfe=20, final_time=space.final_time
    )
    genes = Genes(start, space, True)
    here = genes.physical(genes.start + 0.02 * torch.randn(len(genes.start), dtype=torch.float64))

    def solve(physical: Tensor) -> Tensor:
        return sample(objective.denoiser, objective.x_T, genes.schedule_of(physical), NOISE)

    wanted = jacobian(solve, here).permute(2, 0, 1)
    residuals, found = Residuals(genes, objective, 1e-6).derivatives(here, torch.arange(5))
    assert torch.allclose(residuals, solve(here) - objective.reference)
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert wanted.abs().amax((1, 2)).min() > 1e-6 * wanted.abs().max()  # no number is idle


def test_an_earlier_residual_is_where_it_starts() -> None:
    """A refined schedule can be refined again, also one whose steps add to older states."""
    space, start = SearchSpace(NOISE, 3), recipe("deis:order=2,grid=lambda", NOISE, 3)
    steps = list(space.adopt(start).steps)
    steps[1] = type(steps[1])(order=2, delta=Residual(x=(0.01, -0.02), x0=(0.03,)))
    old = SolverSchedule(times=space.adopt(start).times, steps=tuple(steps), name="old", path=space.adopt(start).path)
    genes = Genes(old, space, True)
    delta = genes.plain(genes.start).steps[1].delta
    assert delta == Residual(x=(0.01, -0.02), x0=(0.03, 0.0))
    x = torch.randn(4, 4, dtype=torch.float64)
    assert torch.allclose(sample(_denoiser(), x, genes.plain(genes.start), NOISE), sample(_denoiser(), x, old, NOISE))


@pytest.mark.parametrize("nfe", [1, 4, 7])
def test_cost(nfe: int) -> None:
    """The evaluations that a round makes are those that the plan of a search counts."""
    calls = []

    def counted(x: Tensor, t: Tensor) -> Tensor:
        calls.append(len(x))
        return _denoiser()(x, t)

    space = SearchSpace(NOISE, nfe)
    train, validation = _objective(8, 0, counted), _objective(16, 1, counted)
    calls.clear()
    refined = refine(recipe("deis:order=2,grid=lambda", NOISE, nfe), space, train, validation, rounds=1)
    assert refined.evaluations == sum(calls) == 8 * evaluations_per_round(nfe) + 2 * 16 * nfe


def test_linear_problem_is_solved_to_rounding() -> None:
    """One Gaussian: the solution is linear in the noise, and a few coefficients hit it."""
    law = GaussianMixture(torch.tensor([[1.0, -2.0, 0.5, 0.0]], dtype=torch.float64), torch.tensor([0.5]))
    train, validation = (_objective(32, seed, law.denoiser(NOISE)) for seed in (0, 1))
    start = recipe("ddim", NOISE, 3)
    refined = refine(start, SearchSpace(NOISE, 3), train, validation, rounds=8)
    assert refined.start > 0.01
    assert refined.value < 1e-4 * refined.start


def test_held_out_error_falls() -> None:
    space, start = SearchSpace(NOISE, 4), recipe("deis:order=2,grid=lambda", NOISE, 4)
    train, validation, test = (_objective(n, seed) for seed, n in enumerate((64, 64, 128)))
    seen: list[tuple[int, float]] = []
    refined = refine(start, space, train, validation, rounds=4, progress=lambda k, value: seen.append((k, value)))
    assert refined.start == validation(start)
    assert refined.value == validation(refined.schedule) == min(value for _, value in refined.history)
    assert refined.history[1:] == seen
    assert test(refined.schedule) < 0.5 * test(start)
    assert SolverSchedule.from_dict(json.loads(json.dumps(refined.schedule.to_dict()))).digest == refined.schedule.digest
    times_only = refine(start, space, train, validation, rounds=2, coefficients=False)
    assert all(step.delta is None for step in times_only.schedule.steps)
    assert refined.value < times_only.value < refined.start


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_network(dtype: torch.dtype) -> None:
    """Larger differences drown the rounding of a network's answers; those made for float32 do not."""
    exact = _denoiser()

    def rounded(x: Tensor, t: Tensor) -> Tensor:
        return exact(x.to(dtype).double(), t).to(dtype).to(x)

    space, start = SearchSpace(NOISE, 4), recipe("deis:order=2,grid=lambda", NOISE, 4)
    train, validation = (_objective(64, seed, rounded, torch.float32) for seed in (0, 1))
    refined = refine(start, space, train, validation, rounds=3, difference=3e-2)
    assert refined.value < 0.6 * refined.start
    if dtype == torch.bfloat16:
        fine = Residuals(Genes(start, space, True), train, 1e-5)
        coarse, exactly = Residuals(fine.genes, train, 3e-2), Residuals(fine.genes, _objective(64, 0), 1e-6)
        here, rows = fine.genes.physical(fine.genes.start), torch.arange(64)
        wanted = exactly.derivatives(here, rows)[1]
        errors = [(each.derivatives(here, rows)[1] - wanted).norm() / wanted.norm() for each in (fine, coarse)]
        assert errors[1] < 0.3 < errors[0]


def test_a_start_that_is_not_finite_stays() -> None:
    def broken(x: Tensor, t: Tensor) -> Tensor:
        return x / 0.0 if t < 0.3 else x

    train, start = _objective(8, 0), recipe("ddim", NOISE, 4)
    bad = replace(train, denoiser=broken)
    refined = refine(start, SearchSpace(NOISE, 4), bad, bad)
    assert refined.schedule == start
    assert refined.value == refined.start == PENALTY


def test_refusals() -> None:
    space, train = SearchSpace(NOISE, 4), _objective(8, 0)
    with pytest.raises(ValueError, match="no noise"):
        refine(recipe("ddpm", NOISE, 4), space, train, train)
    blind = Objective(train.denoiser, NOISE, train.x_T, train.terms)
    with pytest.raises(ValueError, match="converged reference"):
        refine(recipe("ddim", NOISE, 4), space, blind, train)

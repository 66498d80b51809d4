"""Objectives, the teacher, the predictor, and searches with every strategy, on a mixture whose denoiser is exact."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from samplers import NoiseSchedule, SolverSchedule, recipe, sample
from samplers.denoisers import GaussianMixture
from samplers.evaluation import FeatureMoments, frechet_distance
from search import PENALTY, STRATEGIES, Objective, Predictor, SearchSpace, run_search, seeds, teacher
from search.selection import best_of_each_kind, classics, ranked, score, with_provenance

NOISE = NoiseSchedule.vp_linear()


def _mixture() -> GaussianMixture:
    g = torch.Generator().manual_seed(3)
    factors = torch.randn(3, 4, 4, generator=g, dtype=torch.float64)
    return GaussianMixture(torch.randn(3, 4, generator=g), covariances=factors @ factors.mT / 8)


def _objective(n: int = 32, seed: int = 0, **options: object) -> Objective:
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))
    return Objective.endpoint(_mixture().denoiser(NOISE), NOISE, x, reference_nfe=60, **options)


@pytest.fixture(scope="module")
def objective() -> Objective:
    return _objective()


# ---- teacher and objectives --------------------------------------------------------------------------------------------


def test_teacher_is_the_exact_solution() -> None:
    """One Gaussian: the flow is known, x_0 = m + L (x_T - alpha m) with per-direction scales."""
    std, mean = 0.5, torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    law = GaussianMixture(mean, torch.tensor([std]))
    x = torch.randn(8, 2, dtype=torch.float64)
    found = teacher(law.denoiser(NOISE), NOISE, x, nfe=200)
    alpha, sigma = NOISE.alpha_sigma(1.0)
    exact = mean + std / torch.sqrt(alpha**2 * std**2 + sigma**2) * (x - alpha * mean)
    error = (found.solution - exact).square().mean().sqrt().item()
    assert error < 2e-4
    assert 0 < found.error < 1e-4
    assert found.nfe == 300


def test_endpoint_value(objective: Objective) -> None:
    schedule = recipe("unipc:order=2,grid=lambda", NOISE, 5)
    x = sample(objective.denoiser, objective.x_T, schedule, NOISE)
    assert objective.reference is not None
    wanted = (x.double() - objective.reference.double()).square().mean().sqrt().item()
    assert objective(schedule) == pytest.approx(wanted, rel=1e-9)
    assert objective(recipe("dpmpp:order=3,taylor=true,grid=lambda", NOISE, 60)) < 1e-6
    assert objective(schedule) == objective(schedule)
    batched = _objective(batch_size=5)
    assert batched(schedule) == pytest.approx(wanted, rel=1e-5)


def test_not_finite_is_penalised(objective: Objective) -> None:
    def broken(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x * math.nan

    bad = Objective(broken, NOISE, objective.x_T, objective.terms, objective.reference)
    assert bad(recipe("ddim", NOISE, 3)) == PENALTY


def test_terms_for_images() -> None:
    law = GaussianMixture(torch.randn(2, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.4]))
    x = torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    whole = Objective.endpoint(law.denoiser(NOISE), NOISE, x, 40, multi_scale=0.5, moments=2.0, features=torch.nn.Flatten())
    terms = whole.evaluate(recipe("ddim", NOISE, 4))
    assert set(terms) == {"value", "rmse", "rmse/2", "rmse/4", "moments", "features"}
    total = terms["rmse"] + 0.5 * (terms["rmse/2"] + terms["rmse/4"]) + 2 * terms["moments"] + terms["features"]
    assert terms["value"] == pytest.approx(total)
    assert terms["features"] == pytest.approx(terms["rmse"])
    mean = Objective.mean([whole, whole])
    assert mean(recipe("ddim", NOISE, 4)) == pytest.approx(whole(recipe("ddim", NOISE, 4)))
    assert mean.digest != whole.digest


def test_distance_objective(objective: Objective) -> None:
    data = _mixture().sample(2000, torch.Generator().manual_seed(5))
    moments = FeatureMoments(4)
    moments.update(data)
    ranked = Objective.distance(objective.denoiser, NOISE, objective.x_T, moments, lambda x: x, name="fd-plain")
    schedule = recipe("ddim", NOISE, 6)
    x = sample(objective.denoiser, objective.x_T, schedule, NOISE).double()
    wanted = frechet_distance(x.mean(0), torch.cov(x.mT), moments.mean, moments.cov)
    assert ranked(schedule) == pytest.approx(wanted, rel=1e-6)


def test_cached_reference(tmp_path: Path) -> None:
    first = _objective(cache=tmp_path, model="mixture")
    calls = []

    def counting(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return x

    again = Objective.endpoint(counting, NOISE, first.x_T, 60, cache=tmp_path, model="mixture")
    assert not calls
    torch.testing.assert_close(again.reference, first.reference, rtol=0, atol=0)
    (file,) = tmp_path.glob("reference-*.safetensors")
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="checksum; delete it"):
        _objective(cache=tmp_path, model="mixture")
    with pytest.raises(ValueError, match="needs `model`"):
        _objective(cache=tmp_path)


def test_objective_refusals() -> None:
    denoiser = _mixture().denoiser(NOISE)
    with pytest.raises(ValueError, match="at least 20"):
        Objective.endpoint(denoiser, NOISE, torch.randn(2, 4), 5)
    with pytest.raises(ValueError, match="x_T"):
        Objective.endpoint(denoiser, NOISE, torch.randn(4))
    with pytest.raises(ValueError, match="multi_scale"):
        Objective.endpoint(denoiser, NOISE, torch.randn(2, 4), multi_scale=1.0)
    with pytest.raises(ValueError, match="final_time"):
        Objective.endpoint(denoiser, NOISE, torch.randn(2, 4), final_time=0.4)


# ---- predictor ---------------------------------------------------------------------------------------------------------


def test_predictor_learns_an_order() -> None:
    """Values that depend on the schedule in a simple way: unseen schedules of another length are ranked rightly."""
    rng = np.random.default_rng(0)
    spaces = [SearchSpace(NOISE, n) for n in (4, 6)]
    schedules = [spaces[i % 2].random(rng) for i in range(120)]
    values = [0.1 + sum(step.order for step in s.steps) / len(s.steps) + float(s.times[1]) for s in schedules]
    predictor = Predictor(NOISE, members=2, seed=0)
    tau = predictor.fit(schedules[:90], values[:90], epochs=80)
    assert predictor.tau == tau
    assert tau > 0.4
    scores = predictor.scores(schedules[90:]).mean(0)
    assert np.corrcoef(scores, values[90:])[0, 1] > 0.7
    with pytest.raises(ValueError, match="at least 5"):
        predictor.fit(schedules[:3], values[:3])


# ---- searches ----------------------------------------------------------------------------------------------------------


QUICK = ("evolution", "random", "cmaes")


@pytest.mark.parametrize("strategy", [s if s in QUICK else pytest.param(s, marks=pytest.mark.slow) for s in STRATEGIES])
def test_every_strategy(objective: Objective, strategy: str) -> None:
    space = SearchSpace(NOISE, 4)
    trials = 12 if strategy == "gp" else 20
    result = run_search(space, objective, strategy, trials, seed=1)
    assert len(result.trials) == trials
    assert result.value == min(record.value for record in result.trials) == objective(result.best)
    assert result.best.nfe <= 4
    again = run_search(space, objective, strategy, trials, seed=1)
    assert [record.value for record in again.trials] == [record.value for record in result.trials]
    digests = [record.schedule.digest for record in result.trials]
    if strategy in ("s3", "evolution", "random"):
        assert len(set(digests)) == trials


@pytest.mark.slow
def test_never_worse_than_its_seeds(objective: Objective) -> None:
    space = SearchSpace(NOISE, 5)
    result = run_search(space, objective, "s3", 30, seed=0)
    first = seeds(space, 12)
    assert [record.schedule.digest for record in result.trials[:12]] == [schedule.digest for schedule in first]
    assert result.value <= min(objective(schedule) for schedule in first)
    assert result.stages
    assert result.top(3)[0].value == result.value


def test_mean_steps_only_with_a_mean() -> None:
    space = SearchSpace(NOISE, 3, sources=("zero_x0", "average_x0"))
    plain = run_search(space, _objective(), "random", 40, seed=0)
    assert {r.schedule.steps[0].eval.source for r in plain.trials} == {"model", "zero_x0"}
    with_mean = run_search(SearchSpace(NOISE, 3), _objective(first_x0=_mixture().mean), "random", 40, seed=0)
    assert "average_x0" in {r.schedule.steps[0].eval.source for r in with_mean.trials}


def test_any_function_may_be_searched_on() -> None:
    space = SearchSpace(NOISE, 3)
    result = run_search(space, lambda schedule: math.nan if schedule.analytic_first_step else len(schedule.steps), "s3", 15)
    assert result.value == 3
    assert any(record.value == PENALTY for record in result.trials)


@pytest.mark.slow
def test_storage_resumes_and_remembers(objective: Objective, tmp_path: Path) -> None:
    space, storage = SearchSpace(NOISE, 4), str(tmp_path / "study.db")
    calls: list[str] = []

    class Counting:
        noise_schedule, digest, identity = NOISE, objective.digest, objective.identity

        def __call__(self, schedule: SolverSchedule) -> float:
            calls.append(schedule.digest)
            return objective(schedule)

    first = run_search(space, Counting(), "s3", 8, storage, seed=0)
    assert len(calls) == len(first.trials) == 8
    more = run_search(space, Counting(), "s3", 12, storage, seed=0)
    assert [r.value for r in more.trials[:8]] == [r.value for r in first.trials]
    assert len(calls) == 12
    # Another strategy on the same storage finds the baselines' values in the ledger.
    run_search(space, Counting(), "evolution", 8, storage, seed=0)
    assert len(calls) <= 12 + 8 - 3
    with pytest.raises(ValueError, match="other settings"):
        run_search(SearchSpace(NOISE, 4, max_order=2), Counting(), "s3", 8, storage, seed=0)


def test_interrupted_trials_are_not_lost(objective: Objective, tmp_path: Path) -> None:
    space, storage, stop = SearchSpace(NOISE, 4), f"sqlite:///{tmp_path / 'study.db'}", [5]

    def interrupted(schedule: SolverSchedule) -> float:
        stop[0] -= 1
        if stop[0] == 0:
            raise KeyboardInterrupt
        return objective(schedule)

    with pytest.raises(KeyboardInterrupt):
        run_search(space, interrupted, "evolution", 10, storage)
    result = run_search(space, interrupted, "evolution", 10, storage)
    assert len(result.trials) == 10
    wanted = [schedule.digest for schedule in seeds(space, 4)]
    assert set(wanted) <= {record.schedule.digest for record in result.trials}
    assert len({record.schedule.digest for record in result.trials}) == 10


def test_search_refusals(objective: Objective) -> None:
    space = SearchSpace(NOISE, 4)
    for arguments, message in (
        ((space, objective, "annealing"), "known: s3"),
        ((space, objective, "s3", 0), "trials"),
        ((space, objective, "s3", 5, "redis://x"), "unknown storage"),
        ((SearchSpace(NoiseSchedule.edm(), 4), objective), "noise schedule"),
        ((SearchSpace(NOISE, 4, final_time=NOISE.t_min), objective), "ends at"),
    ):
        with pytest.raises(ValueError, match=message):
            run_search(*arguments)


# ---- afterwards --------------------------------------------------------------------------------------------------------


def test_selection_and_provenance(objective: Objective, generator: Callable[..., torch.Generator], tmp_path: Path) -> None:
    space, test = SearchSpace(NOISE, 4), _objective(n=64, seed=9)
    candidates = seeds(space, 6)
    chosen = ranked(candidates, [test])[0]
    assert test(chosen) == min(test(schedule) for schedule in candidates)
    found = score(chosen, test, "chosen")
    assert found.low < found.value < found.high
    assert found.value == pytest.approx(test(chosen))
    known = classics(space, objective, limit=12)
    assert [c.value for c in known] == sorted(objective(c.schedule) for c in known)
    best = best_of_each_kind(known, test)
    assert set(best) == {"plain", "analytic"}
    assert min(b.value for b in best.values()) <= test(known[0].schedule)
    shipped = with_provenance(chosen, "name", {"scores": [found.to_dict()]})
    shipped.save(tmp_path / "name.json")
    assert SolverSchedule.load(tmp_path / "name.json") == shipped
    assert shipped.digest == chosen.digest
    with pytest.raises(ValueError, match=r"provenance\.x"):
        with_provenance(chosen, "name", {"x": math.nan})

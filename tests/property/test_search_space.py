"""Whatever a search proposes is a member of its space and compiles."""

import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from samplers import NoiseSchedule, SolverSchedule, StepStrategy, Tableau
from search import SearchSpace, baselines, seeds

DISCRETE = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 100, dtype=torch.float64), 0)
FAMILIES = {
    "vp_linear": NoiseSchedule.vp_linear(),
    "vp_cosine": NoiseSchedule.vp_cosine(),
    "vp_discrete": NoiseSchedule.vp_discrete(DISCRETE),
    "edm": NoiseSchedule.edm(),
    "flow": NoiseSchedule.flow(shift=3.0),
}
SOURCES = ("zero_x0", "average_x0")


def _fits(space: SearchSpace, schedule: SolverSchedule) -> None:
    assert schedule.nfe <= space.nfe
    assert schedule.times[-1] == space.final_time
    Tableau.build(schedule, space.noise_schedule, first_x0=torch.zeros(3))
    assert SolverSchedule.from_dict(schedule.to_dict()) == schedule


@pytest.mark.parametrize("final", ["zero", "t_min"])
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**32), nfe=st.integers(1, 7), stochastic=st.booleans())
def test_moves_stay_inside(family: str, final: str, seed: int, nfe: int, stochastic: bool) -> None:
    noise, rng = FAMILIES[family], np.random.default_rng(seed)
    end = 0.0 if final == "zero" else noise.t_min
    space = SearchSpace(noise, nfe, final_time=end, sources=SOURCES, evaluation_shifts=True, noise=stochastic)
    pool = [*seeds(space, 4), space.random(rng)]
    for _ in range(8):
        a, b = (pool[int(rng.integers(len(pool)))] for _ in range(2))
        child = space.cross(a, b, rng) if rng.random() < 0.4 else space.mutate(a, rng, scale=float(rng.uniform(0.1, 2)))
        _fits(space, child)
        pool.append(child)


@pytest.mark.parametrize("family", FAMILIES)
def test_gaps_and_times_are_inverse(family: str) -> None:
    space = SearchSpace(FAMILIES[family], 6)
    gaps = np.random.default_rng(0).dirichlet(np.full(6, 5.0))
    times = space.times(gaps)
    assert times[0] == space.noise_schedule.t_max
    assert all(a > b for a, b in pairwise(times))
    schedule = space.schedule(gaps, (StepStrategy(),) * 6)
    np.testing.assert_allclose(space.gaps(schedule), gaps / gaps.sum(), rtol=1e-6)


def test_mutation_changes_every_gene() -> None:
    """Over many moves every kind of gene is reached, and a mutation never returns its parent."""
    space, rng = SearchSpace(FAMILIES["vp_linear"], 5), np.random.default_rng(1)
    schedule, seen = seeds(space, 1)[0], set()
    first = schedule
    for _ in range(400):
        child = space.mutate(schedule, rng)
        assert child.digest != schedule.digest
        seen |= {f"pred:{'mixed' if isinstance(s.pred, tuple) else s.pred}" for s in child.steps}
        seen |= {f"order:{s.order}" for s in child.steps} | {f"axis:{s.axis}" for s in child.steps}
        seen |= {f"source:{s.eval.source}" for s in child.steps} | {f"start:{s.start}" for s in child.steps}
        seen |= {"corr" for s in child.steps if s.corr} | {"relax" for s in child.steps if s.relax}
        seen |= {"low" for s in child.steps if s.d_nodes}
        schedule = child if rng.random() < 0.5 else first
    wanted = {"pred:x0", "pred:eps", "pred:mixed", *(f"order:{p}" for p in (1, 2, 3, 4)), "axis:lambda", "axis:sigma", "axis:t"}
    assert wanted | {"source:model", "source:zero_x0", "start:-1", "start:-2", "corr", "relax", "low"} <= seen


def test_noise_only_where_it_is_asked_for() -> None:
    noisy, plain = (SearchSpace(FAMILIES["vp_linear"], 5, noise=allowed) for allowed in (True, False))
    schedule, amounts, rng = noisy.random(0), set(), np.random.default_rng(2)
    for _ in range(60):
        schedule = noisy.mutate(schedule, rng)
        amounts |= {step.noise.amount for step in schedule.steps if step.noise}
    assert len(amounts) > 5
    assert schedule.stochastic
    assert not plain.adopt(schedule).stochastic
    assert not plain.cross(schedule, schedule, rng).stochastic


def test_generators_of_all_kinds() -> None:
    space = SearchSpace(FAMILIES["edm"], 4)
    for make in (
        lambda: np.random.default_rng(3),
        lambda: random.Random(3),
        lambda: torch.Generator().manual_seed(3),
        lambda: 3,
    ):
        assert space.random(make()) == space.random(make())
    with pytest.raises(TypeError, match="rng"):
        space.random("seed")


def test_canonical_form() -> None:
    """Steps that compile to the same numbers are the same schedule."""
    space = SearchSpace(FAMILIES["vp_linear"], 3)
    gaps = np.array([0.5, 0.3, 0.2])
    plain = space.schedule(gaps, (StepStrategy(),) * 3)
    for other in (StepStrategy(pred="eps"), StepStrategy(pred=(1.0, 0.0)), StepStrategy(axis="sigma")):
        assert space.schedule(gaps, (other,) * 3).digest == plain.digest
    second = space.schedule(gaps, (StepStrategy(), StepStrategy(order=2, relax=(0.0,)), StepStrategy()))
    assert second.digest == space.schedule(gaps, (StepStrategy(), StepStrategy(order=2), StepStrategy())).digest != plain.digest


def test_seeds_are_the_baselines_themselves() -> None:
    space = SearchSpace(FAMILIES["vp_discrete"], 5)
    found = {schedule.digest for schedule in seeds(space)}
    named = dict(baselines(space.noise_schedule, 5))
    assert {schedule.digest for schedule in named.values()} == found
    assert len(found) > 200
    assert any("afs=zero_x0" in text for text in named)
    foreign = SearchSpace(FAMILIES["vp_discrete"], 4).random(0)
    assert seeds(space, 1, extra=[foreign])[0].digest == foreign.digest


def test_refusals() -> None:
    noise = FAMILIES["vp_linear"]
    for options, message in (
        ({"nfe": 0}, "nfe must be"),
        ({"nfe": 2.5}, "nfe must be"),
        ({"nfe": 4, "final_time": 1.0}, "final_time"),
        ({"nfe": 4, "max_order": 5}, "max_order"),
        ({"nfe": 4, "predictions": ("v",)}, "predictions"),
        ({"nfe": 4, "axes": ()}, "axes"),
        ({"nfe": 4, "sources": ("mean",)}, "sources"),
    ):
        with pytest.raises(ValueError, match=message):
            SearchSpace(noise, **options)

"""Resampling: unbiased offspring, bounded spread, edge cases, and agreement in law with an independent implementation."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from samplers.particles import SCHEMES, resample
from samplers.particles.weights import conditional_ess, ess, log_mean_exp, normalise, tempered

UNBIASED = [name for name in SCHEMES if name != "birth_death"]
GOLDEN = Path(__file__).parents[1] / "golden" / "resampling_particles.json"
Gen = Callable[..., torch.Generator]


def offspring(ancestors: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(ancestors, ancestors.shape[-1]).sum(-2)


def many(log_w: Tensor, scheme: str, g: torch.Generator, draws: int) -> Tensor:
    """Offspring counts (draws, K) of independent resamplings."""
    return offspring(resample(log_w.expand(draws, -1), scheme, g)).double()


@pytest.mark.parametrize("scheme", UNBIASED)
def test_offspring_are_right_on_average(scheme: str, generator: Gen) -> None:
    log_w = torch.randn(7, generator=generator(3), dtype=torch.float64) * 1.5
    counts = many(log_w, scheme, generator(), 4000)
    error = counts.mean(0) - 7 * normalise(log_w)
    assert bool((error.abs() < 4.5 * counts.std(0) / 4000**0.5 + 1e-9).all())


@pytest.mark.parametrize("size", [0.05, 0.2])
def test_birth_death_is_right_to_first_order(size: float, generator: Gen) -> None:
    log_w = torch.tensor([1.0, -1.0, 0.3, -0.6, 0.3], dtype=torch.float64) * size
    counts = many(log_w, "birth_death", generator(), 200_000)
    expected = 5 * normalise(log_w)
    first_order = (expected - 1).abs().max()
    assert float((counts.mean(0) - expected).abs().max()) < float(first_order * size + 5 * 0.5 / 200_000**0.5)


@pytest.mark.parametrize("scheme", ["systematic", "ssp"])
@given(log_w=st.lists(st.floats(-8, 8), min_size=1, max_size=12), seed=st.integers(0, 2**31))
def test_offspring_differ_from_their_mean_by_less_than_one(scheme: str, log_w: list[float], seed: int) -> None:
    w = torch.tensor(log_w, dtype=torch.float64)
    counts = offspring(resample(w, scheme, torch.Generator().manual_seed(seed)))
    expected = len(w) * normalise(w)
    assert int(counts.sum()) == len(w)
    assert bool(((counts - expected).abs() < 1 + 1e-9).all())


@given(log_w=st.lists(st.floats(-8, 8), min_size=1, max_size=12), seed=st.integers(0, 2**31))
def test_residual_keeps_the_whole_part(log_w: list[float], seed: int) -> None:
    w = torch.tensor(log_w, dtype=torch.float64)
    counts = offspring(resample(w, "residual", torch.Generator().manual_seed(seed)))
    assert bool((counts >= (len(w) * normalise(w) - 1e-9).floor()).all())


def test_schemes_are_ordered_by_variance(generator: Gen) -> None:
    """Variance of a mean. Systematic moves all points together, so on sorted particles it is above stratified."""
    x = torch.sort(torch.randn(32, generator=generator(1), dtype=torch.float64)).values
    log_w = -((x - 1) ** 2)
    spread = {
        scheme: float(x[resample(log_w.expand(3000, -1), scheme, generator())].mean(-1).var())
        for scheme in ("multinomial", "residual", "stratified", "systematic", "ssp")
    }
    assert spread["residual"] < 0.9 * spread["multinomial"]
    assert spread["stratified"] < 0.5 * spread["multinomial"]
    assert spread["ssp"] < 0.5 * spread["multinomial"]
    assert spread["stratified"] < spread["systematic"] < 0.5 * spread["multinomial"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_particles_without_weight_leave_none(scheme: str, generator: Gen) -> None:
    log_w = torch.tensor([-math.inf, 0.0, math.nan, 0.3, -math.inf], dtype=torch.float64)
    found = resample(log_w.expand(500, -1), scheme, generator())
    assert set(found.unique().tolist()) == {1, 3}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_groups_are_independent_and_equal_weights_survive(scheme: str, generator: Gen) -> None:
    log_w = torch.stack([torch.zeros(6), torch.tensor([0.0, -50, -50, -50, -50, -50])]).double()
    found = resample(log_w, scheme, generator())
    assert set(found[1].tolist()) == {0} or scheme == "birth_death"
    if scheme != "multinomial":
        spread = offspring(found[0])
        assert bool((spread == 1).all()), spread
    dead = resample(torch.full((4,), -math.inf, dtype=torch.float64), scheme, generator())
    assert dead.shape == (4,)
    assert resample(torch.zeros(1), scheme, generator()).tolist() == [0]


def test_same_generator_same_ancestors(generator: Gen) -> None:
    log_w = torch.randn(20, generator=generator(5))
    for scheme in SCHEMES:
        assert torch.equal(resample(log_w, scheme, generator()), resample(log_w + 100.0, scheme, generator()))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_groups_with_generators_of_their_own(scheme: str, generator: Gen) -> None:
    """What becomes of a group does not depend on the others."""
    log_w = torch.randn(3, 8, generator=generator(5), dtype=torch.float64)
    together = resample(log_w, scheme, [generator(seed) for seed in range(3)])
    for seed in range(3):
        assert torch.equal(together[seed], resample(log_w[seed], scheme, generator(seed)))
    with pytest.raises(ValueError, match="2 generators for 3 groups"):
        resample(log_w, scheme, [generator(), generator()])


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown resampling scheme 'sistematic'; known: systematic"):
        resample(torch.zeros(3), "sistematic")
    with pytest.raises(ValueError, match=r"got \(0,\)"):
        resample(torch.zeros(0))


@pytest.mark.parametrize("scheme", ["multinomial", "residual", "stratified", "systematic", "ssp", "killing"])
def test_agrees_in_law_with_particles(scheme: str, generator: Gen) -> None:
    """Frequencies of offspring patterns against those of `particles` 0.4 (see the file's own note)."""
    golden = json.loads(GOLDEN.read_text())
    for case in golden["cases"]:
        log_w = torch.tensor(case["weights"], dtype=torch.float64).log()
        theirs = case["patterns"][scheme]
        draws = 20_000
        counts = many(log_w, scheme, generator(), draws).long()
        mine: dict[str, int] = {}
        for row, n in zip(*(v.tolist() for v in torch.unique(counts, dim=0, return_counts=True)), strict=True):
            mine["".join(map(str, row))] = n
        common = [p for p in sorted(theirs) if theirs[p] + mine.get(p, 0) >= 20]
        rare = [p for p in {*theirs, *mine} if p not in common]
        table = [[d.get(p, 0) for p in common] + [sum(d.get(p, 0) for p in rare)] for d in (theirs, mine)]
        table = [[row[i] for i in range(len(row)) if table[0][i] + table[1][i] > 0] for row in table]
        if len(table[0]) > 1:
            assert stats.chi2_contingency(table).pvalue > 1e-4, (case["weights"], table)


def test_weights_by_hand() -> None:
    log_w = torch.tensor([0.0, math.log(3.0)], dtype=torch.float64) + 1000.0
    assert normalise(log_w).tolist() == pytest.approx([0.25, 0.75])
    assert float(ess(log_w)) == pytest.approx(1 / (0.0625 + 0.5625))
    assert float(log_mean_exp(log_w)) == pytest.approx(1000 + math.log(2.0))
    assert float(conditional_ess(torch.zeros(2), log_w)) == pytest.approx(float(ess(log_w)))
    assert float(conditional_ess(log_w, torch.zeros(2))) == pytest.approx(2.0)


def test_tempering_keeps_what_was_asked_and_no_more() -> None:
    increment = torch.tensor([[0.0, 5.0, 9.0, 2.0], [0.0, 0.1, 0.0, 0.1]], dtype=torch.float64)
    scaled, kappa = tempered(torch.zeros(2, 4, dtype=torch.float64), increment, 0.6)
    assert float(kappa[1]) == 1.0
    assert 0.0 < float(kappa[0]) < 1.0
    assert float(ess(scaled)[0]) == pytest.approx(0.6 * 4, rel=1e-5)

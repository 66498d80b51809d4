"""Fitting discrete samplers where the answer can be enumerated."""

from dataclasses import replace

import pytest
import torch

from distill import (
    DiscreteTable,
    FitSettings,
    KnobSpace,
    ScoreFit,
    exact_scores,
    fit_discrete_sampler,
    fit_score,
    reasons_against,
)
from distill.exact import exact_kl
from distill.statistics import HammingMMD, block_entropy, support_law, window_chi2, window_gap, window_kl, window_law
from samplers.discrete import (
    MaskedProcess,
    TabularModel,
    UniformProcess,
    countdown_chain,
    exact_law,
    parity_law,
    random_chain,
    random_mixture,
    sample_discrete,
)

SPACES = [
    (UniformProcess, KnobSpace("uniform", "euler", 3, 3, ("t", "rate"))),
    (UniformProcess, KnobSpace("uniform", "tweedie", 3, 3, ("t", "temp"))),
    (UniformProcess, KnobSpace("uniform", "tau", 3, 3, ("rate", "temp"))),
    (UniformProcess, KnobSpace("uniform", "theta_trapezoidal", 5, 3, ("t", "rate"))),
    (MaskedProcess, KnobSpace("masked", "tweedie", 3, 3, ("unmask", "temp", "remask"))),
    (MaskedProcess, KnobSpace("masked", "fixed_count", 3, 3, ("count", "temp", "remask"))),
    (MaskedProcess, KnobSpace("masked", "tau", 3, 3, ("t", "rate"))),
]


@pytest.mark.parametrize(("process", "space"), SPACES, ids=lambda v: v.base if isinstance(v, KnobSpace) else "")
def test_gradients_match_finite_differences(process, space):
    process = process(3)
    law = random_chain(process).law(3)
    model = TabularModel(law, process)
    generator = torch.Generator().manual_seed(3)
    point = space.start() + 0.3 * torch.randn(space.dimension, generator=generator, dtype=torch.float64)

    def loss(vector):
        return exact_kl(model, process, 3, space.table(vector), law)

    point.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(point), point)
    assert float(gradient.abs().max()) > 1e-3
    with torch.no_grad():
        for i in range(space.dimension):
            bump = torch.zeros_like(point)
            bump[i] = 1e-5
            slope = (loss(point + bump) - loss(point - bump)) / 2e-5
            assert float(slope) == pytest.approx(float(gradient[i]), rel=2e-4, abs=2e-7)


@pytest.mark.parametrize(("process", "space"), SPACES, ids=lambda v: v.base if isinstance(v, KnobSpace) else "")
def test_the_first_vector_is_the_plain_sampler(process, space, generator):
    process = process(3)
    law = random_chain(process).law(3)
    model = TabularModel(law, process)
    if "remask" in space.knobs:
        space = KnobSpace(space.process, space.base, space.nfe, 3, tuple(k for k in space.knobs if k != "remask"))
    table = space.numbers(space.start())
    assert table.nfe == space.nfe
    torch.testing.assert_close(exact_law(model, process, 3, table=table), exact_law(model, process, 3, table=space.plain))
    ids = [sample_discrete(model, process, (300, 3), table=t, generator=generator(5)) for t in (table, space.plain)]
    assert torch.equal(*ids)


def test_learning_cuts_the_divergence_of_uniform_noise():
    process = UniformProcess(3)
    law = random_chain(process).law(3)
    model = TabularModel(law, process)
    table = fit_discrete_sampler(model, process, 3, 4, ("t", "rate"), "exact_kl", law, settings=FitSettings(budget=40))
    plain = exact_scores(law, exact_law(model, process, 3, 4, "tweedie"))
    learned = exact_scores(law, exact_law(model, process, 3, table=table))
    assert learned["kl"] < 0.2 * plain["kl"]
    assert learned["tv"] < 0.5 * plain["tv"]
    assert table.provenance["improves"]
    # what the provenance says is what the table does
    assert table.provenance["scores"]["learned"]["kl"] == pytest.approx(learned["kl"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("process", "name", "nfe", "before", "after"),
    [
        (MaskedProcess, "mixture", 4, 0.05, 0.02),
        (UniformProcess, "markov", 8, 0.045, 0.01),
        (UniformProcess, "countdown", 8, 0.1, 0.015),
    ],
)
def test_learned_samplers_reach_the_known_gains(process, name, nfe, before, after):
    process = process(3)
    laws = {
        "mixture": lambda: random_mixture(process, 5).law(),
        "markov": lambda: random_chain(process).law(5),
        "countdown": lambda: countdown_chain(process).law(5),
    }
    law = laws[name]()
    model = TabularModel(law, process)
    assert exact_scores(law, exact_law(model, process, 5, nfe, "tweedie"))["kl"] > before
    table = fit_discrete_sampler(model, process, 5, nfe, target=law)
    assert exact_scores(law, exact_law(model, process, 5, table=table))["kl"] < after
    assert table.provenance["improves"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("process", "name", "nfe", "rates", "worse"),
    [
        # exact expectations of the printed objective's minimiser, and its divergence, from an independent computation
        (MaskedProcess, "parity", 4, (1.0, 0.75, 0.49), (0.284, 0.447)),
        (UniformProcess, "markov", 4, (1.0,), (0.236, 0.25)),
    ],
)
def test_the_printed_score_objective_shrinks_and_harms(process, name, nfe, rates, worse):
    law = parity_law(6) if name == "parity" else random_chain(UniformProcess(3)).law(5)
    process = process(law.shape[0])
    model = TabularModel(law, process)
    with pytest.warns(UserWarning, match="no improvement"):
        table = fit_discrete_sampler(model, process, law.ndim, nfe, objective="score_l2", target=law)
    assert table.rate[: len(rates)] == pytest.approx(rates, abs=0.02)
    assert all(later < earlier for earlier, later in zip(table.rate[:-2], table.rate[1:-1], strict=True))
    scores = table.provenance["scores"]
    assert scores["plain"]["kl"] == pytest.approx(worse[0], abs=0.002)
    assert scores["learned"]["kl"] > worse[1] - 0.01
    assert not table.provenance["improves"]


QUICK = ScoreFit(teacher_nfe=16, samples=300, rounds=3)


def test_the_printed_objectives_shrink_multipliers_and_steps():
    process = UniformProcess(3)
    model = TabularModel(random_chain(process).law(4), process)
    table = fit_score(KnobSpace("uniform", "euler", 4, 4, ("rate",)), model, process, QUICK)
    assert table.rate[0] == pytest.approx(1.0)  # teacher and student still share their state
    assert 0.3 < table.rate[2] < table.rate[1] < 0.8
    with pytest.warns(UserWarning, match="of the time axis"):
        table = fit_score(KnobSpace("uniform", "euler", 4, 4, ("t",)), model, process, QUICK)
    assert table.provenance["covered"] < 0.3  # 4 / 16 of the axis if nothing else shrank
    # under masked noise, comparing mass over the whole step repairs the scale
    process = MaskedProcess(3)
    model = TabularModel(random_chain(process).law(4), process)
    table = fit_score(KnobSpace("masked", "euler", 4, 4, ("t",)), model, process, replace(QUICK, block=True))
    assert table.provenance["covered"] > 0.5
    with pytest.raises(ValueError, match="t and rate"):
        fit_score(KnobSpace("masked", "tweedie", 4, 4, ("temp",)), model, process, QUICK)


def test_perturbed_starts_change_the_given_share():
    from distill.score import _redrawn

    process = MaskedProcess(5)
    x = process.prior((200, 40))
    y = _redrawn(x, process, 0.05, torch.Generator().manual_seed(0))
    assert torch.equal((y != x).sum(-1), torch.full((200,), 2))
    assert torch.equal(_redrawn(x, process, 0.0, torch.Generator()), x)


def test_sharpening_is_not_called_an_improvement():
    process = MaskedProcess(3)
    law = random_mixture(process, 5).law()
    model = TabularModel(law, process)
    plain = DiscreteTable.plain("masked", "tweedie", 4)
    sharp = DiscreteTable("masked", "tweedie", plain.times, temp=(2.0,) * 4)
    before = exact_scores(law, exact_law(model, process, 5, table=plain))
    after = exact_scores(law, exact_law(model, process, 5, table=sharp))
    assert after["nll_gap"] < 0 < before["nll_gap"]  # likelier than the data itself
    assert after["kl"] > before["kl"]
    reasons = reasons_against(before, after)
    assert any("sharper" in reason for reason in reasons)
    assert any("likelier" in reason for reason in reasons)
    assert reasons_against(before, before) == []


def test_exact_scores_by_hand():
    law, student = torch.tensor([0.5, 0.5]).double(), torch.tensor([0.25, 0.75]).double()
    scores = exact_scores(law, student)
    entropy = -(0.25 * torch.tensor(0.25).log() + 0.75 * torch.tensor(0.75).log())
    assert scores["tv"] == pytest.approx(0.25)
    assert scores["kl"] == pytest.approx(0.5 * torch.tensor(2.0).log().item() + 0.5 * torch.tensor(2 / 3).log().item())
    assert scores["nll_gap"] == pytest.approx(0.0, abs=1e-12)
    assert scores["entropy_gap"] == pytest.approx(float(entropy) - torch.tensor(2.0).log().item(), rel=1e-6)


def test_statistics_by_hand():
    ids = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 0]])
    assert window_law(ids, "2gram", 2).tolist() == pytest.approx([0.0, 1 / 6, 2 / 6, 3 / 6])
    assert window_law(ids, "lag3", 2).tolist() == pytest.approx([0.5, 0.0, 0.5, 0.0])
    assert window_law(ids, "patch2w2", 2)[0b0110] == 0.5
    law = torch.tensor([0.25, 0.75]).double()
    smoothed = torch.tensor([2.5, 6.5]).double() / 9  # two zeros and six ones, and half a count each
    assert window_kl(law, torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]]), "1gram", 2) == pytest.approx(
        float((law * (law / smoothed).log()).sum())
    )
    assert support_law(ids, torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0]])).tolist() == [0.5, 0.0, 0.5]
    with pytest.raises(ValueError, match="known: <n>gram"):
        window_law(ids, "bigram", 2)
    with pytest.raises(ValueError, match="does not fit"):
        window_law(ids, "patch3w3", 2)


def test_a_sparse_table_does_not_reward_sharpening(generator):
    law = torch.softmax(torch.randn(40, generator=generator(0), dtype=torch.float64), 0)
    pairs = (law[:, None] * law).flatten()
    sharp = law**1.5 / (law**1.5).sum()
    means = {}
    for name, source in (("same", law), ("sharp", sharp)):
        draws = torch.multinomial(source, 200 * 30 * 6, replacement=True, generator=generator(1)).view(200, 30, 6)
        for distance in (window_chi2, window_kl):
            means[name, distance] = torch.tensor([distance(pairs, x, "2gram", 40) for x in draws])
    exact = float(0.5 * ((sharp[:, None] * sharp - law[:, None] * law) ** 2 / (law[:, None] * law + 0.5 / 1600)).sum())
    found = means["sharp", window_chi2]
    assert float(found.mean()) == pytest.approx(exact, abs=4 * float(found.std()) / 200**0.5)
    found = means["same", window_chi2]
    assert float(found.mean()) == pytest.approx(0.0, abs=4 * float(found.std()) / 200**0.5)
    # the control: smoothed counts of 150 windows in 1600 cells prefer the sharper law
    assert means["sharp", window_kl].mean() < means["same", window_kl].mean()
    assert window_gap(pairs, draws[0], "2gram", 40) == window_chi2(pairs, draws[0], "2gram", 40)
    many = draws.flatten(0, 1)
    assert window_gap(pairs, many, "2gram", 40) == window_kl(pairs, many, "2gram", 40)


def test_kernel_distance_separates_and_vanishes(generator):
    process = UniformProcess(3)
    chain = random_chain(process)
    a, b = chain.sample(1500, 8, generator(0)), chain.sample(1500, 8, generator(1))
    distance = HammingMMD(a, 3)
    assert abs(distance(b)) < 1e-3
    assert distance(torch.randint(3, (1500, 8), generator=generator(2))) > 2e-2


def test_block_entropy_of_a_chain(generator):
    chain = random_chain(UniformProcess(3))
    x = chain.sample(4000, 20, generator(0))
    high, low = (-(law * law.log()).sum() for law in (chain.ngram_law(4, 20), chain.ngram_law(3, 20)))
    assert block_entropy(x, 3) == pytest.approx(float(high - low), abs=0.01)

"""Discrete diffusion against the exact chain: rates, bridges, posteriors, conversions, and the laws of samplers."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from scipy.stats import chi2

from samplers.discrete import (
    CATALOGUE,
    DiscreteTable,
    MarkovModel,
    MaskedProcess,
    ProductMixtureModel,
    SupportModel,
    SurvivalSchedule,
    TabularModel,
    UniformProcess,
    countdown_chain,
    exact_law,
    from_log_score,
    from_logits,
    is_sudoku,
    parity_law,
    random_chain,
    random_mixture,
    sample_discrete,
    sharpen,
    sudoku_grids,
    sudoku_model,
    to_log_score,
    transition,
)

PROCESSES = [MaskedProcess, UniformProcess]
SCHEDULES = [SurvivalSchedule(), SurvivalSchedule("geometric", sigma_max=8.0), SurvivalSchedule("cosine")]


def states(process, length):
    return torch.cartesian_prod(*[torch.arange(process.states)] * length).view(-1, length)


def joint(process, law, t):
    """p(x0, x_t) as (V^L, S^L), by brute force from the forward matrix."""
    length = law.ndim
    points, ids = torch.cartesian_prod(*[torch.arange(process.vocab)] * length).view(-1, length), states(process, length)
    matrix = process.forward_matrix(0.0, t)
    return law.reshape(-1, 1) * matrix[points[:, None], ids[None]].prod(-1)


def kl(p, q):
    p, q = p.flatten(), q.flatten()
    keep = p > 0
    return float((p[keep] * (p[keep] / q[keep]).log()).sum())


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.kind)
def test_forward_matrix_is_the_exponential_of_its_rates(process, schedule):
    process = process(3, schedule)
    steps = 1000
    times = torch.linspace(0.1, 0.7, steps + 1, dtype=torch.float64)
    middle = 0.5 * (times[:-1] + times[1:])
    total = sum(process.rate_matrix(t) for t in middle) * (0.6 / steps)  # the matrices commute
    torch.testing.assert_close(process.forward_matrix(0.1, 0.7), torch.linalg.matrix_exp(total), atol=1e-6, rtol=0)
    t = torch.tensor([0.05, 0.4, 0.9], dtype=torch.float64)
    torch.testing.assert_close(schedule.t_of_alpha(schedule.alpha(t)), t)
    t = t.requires_grad_()
    (slope,) = torch.autograd.grad(schedule.alpha(t).log().sum(), t)
    torch.testing.assert_close(schedule.rate(t), -slope)


@pytest.mark.parametrize("process", PROCESSES)
def test_posteriors_are_bayes_rule(process):
    process, t = process(3), 0.45
    chain, mixture = random_chain(process), random_mixture(process, 4)
    for model, law in ((chain, chain.law(4)), (mixture, mixture.law())):
        table = joint(process, law, t)
        hot = torch.nn.functional.one_hot(torch.cartesian_prod(*[torch.arange(3)] * 4), 3).double()
        wanted = torch.einsum("nlv,ns->slv", hot, table / table.sum(0))
        ids = states(process, 4)
        for each in (model, TabularModel(law, process)):
            torch.testing.assert_close(each(ids, torch.tensor(t, dtype=torch.float64)), wanted, atol=1e-12, rtol=0)
            per_row = each(ids, torch.full((len(ids),), t, dtype=torch.float64))
            torch.testing.assert_close(per_row, wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("process", PROCESSES)
def test_reverse_rates_and_bridges_are_those_of_the_exact_chain(process):
    process, t, s = process(3), 0.6, 0.6 - 1e-6
    law = random_chain(process).law(3)
    model, ids = TabularModel(law, process), states(process, 3)
    # exact reverse transition p(x_s | x_t) of the whole sequence, by Bayes' rule
    step = process.forward_matrix(s, t)
    both = joint(process, law, s).sum(0)[:, None] * step[ids[:, None], ids[None]].prod(-1)
    reverse = (both / both.sum(0)).T
    probs = model(ids, torch.tensor(t, dtype=torch.float64))
    rates = process.reverse_rates(probs, ids, t)
    place = process.states ** torch.arange(2, -1, -1)
    for site in range(3):
        for token in range(process.states):
            there = ids.clone()
            there[:, site] = token
            moved = there[:, site] != ids[:, site]
            exact = reverse[torch.arange(len(ids)), (there * place).sum(-1)] / 1e-6
            reachable = moved & (joint(process, law, t).sum(0) > 0)
            torch.testing.assert_close(rates[reachable, site, token], exact[reachable], rtol=2e-5, atol=1e-9)
    # one site's marginal of the exact reverse transition over a large step is the bridge
    step = process.forward_matrix(0.2, t)
    both = joint(process, law, 0.2).sum(0)[:, None] * step[ids[:, None], ids[None]].prod(-1)
    reverse = (both / both.sum(0)).T
    bridge = process.bridge(probs, ids, t, 0.2)
    hot = torch.nn.functional.one_hot(ids, process.states).double()
    torch.testing.assert_close(torch.einsum("ns,slv->nlv", reverse, hot), bridge, atol=1e-12, rtol=0)


def test_masked_euler_is_tweedie_on_the_log_linear_schedule():
    process = MaskedProcess(3)
    model = random_chain(process)
    x = states(process, 3)
    probs = model(x, torch.tensor(0.5))
    euler, tweedie = CATALOGUE["euler"].rows, CATALOGUE["tweedie"].rows
    step = type("Step", (), {"t": 0.5, "s": 0.3, "rate": 1.0, "unmask": None})
    torch.testing.assert_close(euler(process, probs, x, step, {}), tweedie(process, probs, x, step, {}), atol=1e-12, rtol=0)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.kind)
def test_scores_and_posteriors_round_trip(process, schedule):
    process = process(4, schedule)
    model = random_mixture(process, 3)
    x = states(process, 3)
    for t in (0.05, 0.5, 0.95):
        exact = model(x, torch.tensor(t, dtype=torch.float64))
        there_and_back = from_log_score(to_log_score(model, process), process, time="t", time_dtype=torch.float64)
        torch.testing.assert_close(there_and_back(x, torch.tensor(t, dtype=torch.float64)), exact, atol=1e-9, rtol=0)
        logits = from_logits(lambda ids, _t=t: model(ids, torch.tensor(_t, dtype=torch.float64)).log(), process)
        torch.testing.assert_close(logits(x, torch.tensor(t, dtype=torch.float64)), exact, atol=1e-12, rtol=0)
    if process.name == "masked":  # the score of a fully masked site sums to alpha / (1 - alpha)
        masked = torch.full((1, 3), process.mask_id)
        alpha = process.alpha(0.5)
        score = to_log_score(model, process)(masked, torch.tensor(0.5)).exp()
        torch.testing.assert_close(score[..., :-1].sum(-1), (alpha / (1 - alpha)).expand(1, 3))


@pytest.mark.parametrize("name", [n for n in CATALOGUE if n not in ("first_hitting", "confidence")])
@pytest.mark.parametrize("process", PROCESSES)
def test_laws_are_laws_and_converge(name, process):
    process = process(3)
    if process.name not in CATALOGUE[name].processes:
        pytest.skip("the transition is for the other process")
    law = random_chain(process).law(3)
    errors = []
    for nfe in (1, 2, 6, 24):
        result = exact_law(TabularModel(law, process), process, 3, nfe, name)
        assert float(result.min()) >= 0
        assert float(result.sum()) == pytest.approx(1.0, abs=1e-9)
        errors.append(kl(law, result))
    assert errors[-1] < 0.15 * errors[0]
    assert errors[-1] < 0.02 + 0.03 * (name in ("theta_rk2", "remdm"))


@pytest.mark.parametrize("process", PROCESSES)
def test_tweedie_is_exact_on_factorised_data(process):
    process = process(3)
    model = random_mixture(process, 4, components=1)
    result = exact_law(model, process, 4, 3, "tweedie")
    # uniform noise of eps = 1e-3 survival at the start is the only error
    torch.testing.assert_close(result, model.law(), atol=2e-4 if process.name == "uniform" else 1e-12, rtol=0)
    clean = type(process)(3, SurvivalSchedule(eps=1e-9))
    model = ProductMixtureModel(model.weights, model.sites, clean)
    torch.testing.assert_close(exact_law(model, clean, 4, 3, "tweedie"), model.law(), atol=1e-9, rtol=0)


def test_fixed_count_one_by_one_is_exact():
    process = MaskedProcess(3)
    law = random_chain(process).law(4)
    torch.testing.assert_close(exact_law(TabularModel(law, process), process, 4, 4, "fixed_count"), law, atol=1e-12, rtol=0)


SAMPLED = [
    ("masked", DiscreteTable.plain("masked", "euler", 3)),
    ("masked", DiscreteTable.plain("masked", "tau", 3, grid="cosine")),
    ("masked", DiscreteTable.plain("masked", "tweedie", 3)),
    ("masked", DiscreteTable.plain("masked", "remdm:eta=0.5", 4)),
    ("masked", DiscreteTable.plain("masked", "fixed_count", 2)),
    ("masked", DiscreteTable.plain("masked", "confidence", 2)),
    ("masked", DiscreteTable.plain("masked", "entropy_bound:bound=0.6", 2)),
    ("masked", DiscreteTable.plain("masked", "theta_trapezoidal", 5)),
    ("masked", DiscreteTable.plain("masked", "theta_rk2:theta=0.4", 4)),
    ("masked", DiscreteTable("masked", "fixed_count", (1, 0.6, 0.2, 0), temp=(1, 2, 0.5), count=(0.5, 1.7, 0.8))),
    ("masked", DiscreteTable("masked", "fixed_count", (1, 0.6, 0.2, 0), count=(2, 1, 0), remask=(0.3, 0.5, 0))),
    (
        "masked",
        DiscreteTable("masked", "tweedie", (1, 0.6, 0.2, 0), unmask=(0.2, 0.5, 1), remask=(0.3, 0.1, 0), temp=(1, 3, 0.7)),
    ),
    ("uniform", DiscreteTable.plain("uniform", "euler", 3)),
    ("uniform", DiscreteTable.plain("uniform", "tau", 3)),
    ("uniform", DiscreteTable.plain("uniform", "tweedie:top_p=0.9", 3)),
    ("uniform", DiscreteTable.plain("uniform", "theta_trapezoidal:theta=0.3", 5)),
    ("uniform", DiscreteTable.plain("uniform", "theta_rk2", 4)),
    ("uniform", DiscreteTable("uniform", "euler", (1, 0.7, 0.3, 0), rate=(1, 0.5, 1), temp=(0.8, 1.5, 1.2))),
]


def chi_square(counts, law):
    expected = law.flatten() * counts.sum()
    keep = expected > 5
    observed = torch.cat([counts[keep], counts[~keep].sum()[None]])
    wanted = torch.cat([expected[keep], expected[~keep].sum()[None]])
    some = wanted > 0
    assert float(observed[~some].sum()) == 0
    statistic = float(((observed - wanted)[some] ** 2 / wanted[some]).sum())
    return float(chi2.sf(statistic, int(some.sum()) - 1))


@pytest.mark.parametrize(("name", "table"), SAMPLED, ids=lambda v: v if isinstance(v, str) else v.transition)
def test_samples_have_the_enumerated_law(name, table, generator):
    process = {"masked": MaskedProcess, "uniform": UniformProcess}[name](3)
    law = random_chain(process).law(3)
    model = TabularModel(law, process)
    exact = exact_law(model, process, 3, table=table)
    x = sample_discrete(model, process, (20_000, 3), table=table, generator=generator(1))
    counts = torch.bincount((x * torch.tensor([9, 3, 1])).sum(-1), minlength=27).double()
    assert chi_square(counts, exact) > 1e-3
    # negative control: the law of another step size is refused by the same test
    other = exact_law(model, process, 3, nfe=1)
    assert chi_square(counts, other) < 1e-6


def test_entropy_bound_reveals_what_is_nearly_sure(generator):
    process = MaskedProcess(3)
    sites = torch.tensor([[0.98, 0.01, 0.01], [0.4, 0.3, 0.3], [0.9, 0.05, 0.05], [1 / 3, 1 / 3, 1 / 3]]).double()
    entropy = torch.special.entr(sites).sum(-1)  # .11, 1.09, .39, 1.10
    model = ProductMixtureModel(torch.ones(1).double(), sites[None], process)
    shown = []

    def watched(x, t):
        shown.append((x != process.mask_id).double().mean(0))
        return model(x, t)

    for bound, wanted in (
        (0.0, [[0, 0, 0, 0], [1, 0, 0, 0], [1, 0, 1, 0], [1, 1, 1, 0]]),
        (float(entropy[0]) + 1e-6, [[0, 0, 0, 0], [1, 0, 1, 0], [1, 1, 1, 0]]),  # all but the largest: .11 alone
        (float(entropy[[0, 2]].sum()) + 1e-6, [[0, 0, 0, 0], [1, 1, 1, 0]]),
        (10.0, [[0, 0, 0, 0]]),
    ):
        shown.clear()
        x = sample_discrete(watched, process, (400, 4), 8, f"entropy_bound:bound={bound!r}", generator=generator(1))
        assert torch.stack(shown).tolist() == wanted  # and no evaluation once all is revealed
        assert int(x.max()) < 3
    law = random_chain(process).law(4)  # one token per evaluation is exact, in any order
    one_by_one = exact_law(TabularModel(law, process), process, 4, 4, "entropy_bound:bound=0")
    torch.testing.assert_close(one_by_one, law, atol=1e-12, rtol=0)


def test_a_network_takes_the_exponent_into_its_logits(generator, monkeypatch):
    logits = torch.randn(5, 6, dtype=torch.float64, generator=generator(0))
    for process in (MaskedProcess(6), UniformProcess(6)):
        model = from_logits(lambda x: logits.expand(len(x), 5, 6), process)
        x = process.prior((3, 5), generator(1))
        torch.testing.assert_close(model.tempered(x, torch.tensor(0.5), 2.5), sharpen(model(x, torch.tensor(0.5)), 2.5))
        base = {"masked": "fixed_count", "uniform": "tweedie"}[process.name]
        table = DiscreteTable(process.name, base, (1.0, 0.6, 0.3, 0.0), temp=(0.7, 1.0, 2.0))
        after = sample_discrete(lambda x, t, m=model: m(x, t), process, (200, 5), table=table, generator=generator(2))
        with monkeypatch.context() as patch:  # no power is taken of probabilities
            patch.setattr("samplers.discrete.run.sharpen", None)
            inside = sample_discrete(model, process, (200, 5), table=table, generator=generator(2))
        assert torch.equal(inside, after)


def test_first_hitting_has_the_law_of_one_by_one(generator):
    process = MaskedProcess(3)
    law = random_chain(process).law(3)
    times = []

    def model(x, t):
        times.append(t)
        return TabularModel(law, process)(x, t)

    x = sample_discrete(model, process, (20_000, 3), 3, "first_hitting", generator=generator(2))
    counts = torch.bincount((x * torch.tensor([9, 3, 1])).sum(-1), minlength=27).double()
    assert chi_square(counts, law) > 1e-3
    # the first of n = 3 hitting times: mask probability is the largest of three uniforms
    hidden = 1.0 - process.alpha(times[0])
    assert float(hidden.mean()) == pytest.approx(0.75 * (1 - 1e-3), abs=3 * 0.194 / math.sqrt(20_000))
    assert all((later < earlier).all() for earlier, later in pairwise(times))
    with pytest.raises(ValueError, match="needs nfe = 3"):
        sample_discrete(model, process, (2, 3), 2, "first_hitting")


def test_contradictory_states_get_the_nearest_sequences():
    process = MaskedProcess(2)
    model = SupportModel(torch.tensor([[0, 0, 0], [1, 1, 0], [1, 1, 1]]), process, torch.tensor([1.0, 1.0, 3.0]))
    probs = model(torch.tensor([[0, 1, 2]]), torch.tensor(0.5))  # no sequence begins with 0 1; all three miss one site
    torch.testing.assert_close(probs[0, 2], torch.tensor([0.4, 0.6], dtype=torch.float64))


def test_markov_entropy_and_ngrams():
    process = UniformProcess(3)
    chain = random_chain(process)
    law = chain.law(4)
    assert chain.entropy(4) == pytest.approx(-float((law * law.log()).sum()), rel=1e-12)
    pairs = (law.sum((2, 3)) + law.sum((0, 3)) + law.sum((0, 1))) / 3
    torch.testing.assert_close(chain.ngram_law(2, 4), pairs)
    ids = states(process, 4)
    torch.testing.assert_close(chain.log_prob(ids).exp(), law.flatten())


def test_rules():
    grids = sudoku_grids()
    assert len(grids) == 288
    assert len(torch.unique(grids, dim=0)) == 288
    assert is_sudoku(grids).all()
    swapped = grids.clone()
    swapped[:, [0, 1]] = swapped[:, [1, 0]]
    assert not is_sudoku(swapped).any()
    assert float(parity_law(4, leak=0.02).sum()) == pytest.approx(1.0)
    process = MaskedProcess(6)
    chain = countdown_chain(process)
    x = chain.sample(200, 32)
    jumps = (x[:, :-1] > 0) & (x[:, 1:] != x[:, :-1] - 1)
    assert 0 < float(jumps.double().mean()) < 0.02
    assert isinstance(chain, MarkovModel)
    with pytest.raises(ValueError, match="4 symbols"):
        sudoku_model(process)


@pytest.mark.parametrize("base", ["fixed_count", "theta_trapezoidal", "confidence"])
def test_a_temperature_is_the_inverse_of_a_constant_exponent(base, generator):
    process = MaskedProcess(3)
    law = random_chain(process).law(3)
    model, plain = TabularModel(law, process), DiscreteTable.plain("masked", base, 3)
    warm = DiscreteTable.plain("masked", f"{base}:temperature=0.5", 3)
    table = replace(plain, temp=(2.0,) * plain.steps)
    assert torch.equal(exact_law(model, process, 3, table=warm), exact_law(model, process, 3, table=table))
    assert not torch.allclose(exact_law(model, process, 3, table=warm), exact_law(model, process, 3, table=plain), atol=0.01)
    first, second = (sample_discrete(model, process, (50, 3), table=t, generator=generator(1)) for t in (warm, table))
    assert torch.equal(first, second)
    with pytest.raises(ValueError, match=r"temperature must be in \[0.01, 100\], got 0"):
        transition("tweedie:temperature=0")


def test_transitions_say_what_they_are():
    for name, entry in CATALOGUE.items():
        assert entry.source
        assert transition(name).text == name
        for nfe in (1, 4, 5):
            assert entry.nfe(entry.steps(nfe)) in (nfe, nfe - 1) if entry.kind == "two_stage" else nfe
    for nfe in (1, 2, 3, 4, 7, 8):
        table = DiscreteTable.plain("uniform", "theta_trapezoidal", nfe)
        assert table.nfe == nfe
        calls = []
        process = UniformProcess(3)
        sample_discrete(
            lambda x, t, calls=calls: calls.append(t) or torch.full((*x.shape, 3), 1 / 3), process, (2, 4), table=table
        )
        assert len(calls) == nfe

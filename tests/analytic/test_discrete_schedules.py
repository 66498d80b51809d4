"""Training-free schedules: they must beat equal steps where equal steps are known to be poor."""

import pytest
import torch

from distill import exact_scores
from samplers.discrete import (
    DiscreteTable,
    MaskedProcess,
    TabularModel,
    UniformProcess,
    countdown_chain,
    exact_law,
    jump_grid,
    optimal_count_table,
    random_chain,
    resample_table,
    sample_discrete,
)


def test_jump_grid_beats_equal_steps_under_uniform_noise(generator):
    process = UniformProcess(3)
    law = random_chain(process).law(4)
    model = TabularModel(law, process)
    grid = jump_grid(model, process, model.sample(300, generator(0)), 5, generator(1), fine=24)
    assert grid[0] == 1.0
    assert grid[-1] == 0.0
    tables = [DiscreteTable("uniform", "tweedie", times) for times in (tuple(grid), (1.0, 0.8, 0.6, 0.4, 0.2, 0.0))]
    jump, plain = (exact_scores(law, exact_law(model, process, 4, table=table))["kl"] for table in tables)
    assert jump < 0.7 * plain
    with pytest.raises(ValueError, match="24 fine times"):
        jump_grid(model, process, model.sample(3), 25, fine=24)


def test_optimal_counts_beat_equal_counts(generator):
    process = MaskedProcess(4)
    chain = countdown_chain(process)
    ids = chain.sample(400, 16, generator(0))
    table = optimal_count_table(chain, process, ids, 4, generator(1))
    assert sum(table.count) == 16
    assert table.count[0] < table.count[-1]  # little is known at first
    nll = []
    for each in (table, DiscreteTable.plain("masked", "fixed_count", 4)):
        x = sample_discrete(chain, process, (4000, 16), table=each, generator=generator(2))
        nll.append(float(-chain.log_prob(x).mean()) - chain.entropy(16))
    assert 0 < nll[0] < 0.97 * nll[1]


def test_answers_carried_to_another_time_keep_what_others_said():
    process = UniformProcess(3)
    model = random_chain(process)
    x = torch.randint(3, (5, 4), generator=torch.Generator().manual_seed(0))
    probs = model(x, torch.tensor(0.6, dtype=torch.float64))
    later = process.retime(probs, x, 0.6, 0.2)
    torch.testing.assert_close(process.leave_one_out(later, x, 0.2), process.leave_one_out(probs, x, 0.6))
    torch.testing.assert_close(process.retime(later, x, 0.2, 0.6), probs)


def test_a_resampled_table_keeps_its_shape():
    table = DiscreteTable(
        "masked", "tweedie", (1, 0.7, 0.2, 0), temp=(0.5, 1.0, 2.0), unmask=(0.25, 1 / 3, 1.0), remask=(0.2, 0.1, 0.0)
    )
    same = resample_table(table, 3)
    for name in ("times", "temp", "unmask", "remask"):
        assert getattr(same, name) == pytest.approx(getattr(table, name))
    double = resample_table(table, 6)
    assert double.nfe == 6
    assert double.times[::2] == pytest.approx(table.times)
    left = (1.0 - torch.tensor(double.unmask)).cumprod(0)[1::2]
    assert left.tolist() == pytest.approx([0.75, 0.5, 0.0], abs=1e-6)
    counts = resample_table(DiscreteTable("masked", "fixed_count", (1, 0.5, 0), count=(2, 6)), 4)
    assert counts.count == pytest.approx((1, 1, 3, 3))
    two = resample_table(DiscreteTable.plain("uniform", "theta_trapezoidal", 5), 8)
    assert two.nfe == 8

"""Properties of kernels and draws for any posterior, state and step."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from samplers.discrete import CATALOGUE, MaskedProcess, SurvivalSchedule, UniformProcess, draw, nucleus, sharpen
from samplers.discrete.kernels import euler_rows, tau_rows
from samplers.discrete.transitions import Step, second_rows, transition, trial_rows

SEEDS = st.integers(0, 10_000)
SCHEDULES = st.sampled_from([SurvivalSchedule(), SurvivalSchedule("geometric"), SurvivalSchedule("cosine")])


def scene(seed, masked, schedule, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    vocab = int(torch.randint(2, 7, (1,), generator=generator))
    process = (MaskedProcess if masked else UniformProcess)(vocab, schedule)
    x = torch.randint(process.states, (4, 3), generator=generator)
    probs = (3 * torch.randn(4, 3, vocab, generator=generator, dtype=torch.float64)).softmax(-1).to(dtype)
    return process, x, process.settle(probs, x)


def is_kernel(rows, tolerance=1e-9):
    assert torch.isfinite(rows).all()
    assert float(rows.min()) >= -tolerance
    torch.testing.assert_close(rows.sum(-1), torch.ones_like(rows[..., 0]), atol=tolerance, rtol=0)


@settings(max_examples=40)
@given(SEEDS, st.booleans(), SCHEDULES, st.floats(0.02, 1.0), st.floats(0.0, 0.98), st.floats(0.0, 20.0))
def test_kernels_conserve_probability(seed, masked, schedule, t, share, rate):
    process, x, probs = scene(seed, masked, schedule)
    step = Step(index=0, steps=2, t=t, s=t * share, rate=rate)
    for entry in CATALOGUE.values():
        if entry.kind == "kernel" and process.name in entry.processes:
            rows = entry.rows(process, probs, x, step, entry.parameters)
            is_kernel(rows)
            if masked:  # revealed tokens stay, or are masked again
                revealed = x != process.mask_id
                kept = rows.gather(-1, x[..., None])[..., 0] + rows[..., -1]
                assert torch.allclose(kept[revealed], torch.ones_like(kept[revealed]))
    is_kernel(process.finish(probs, x))
    rates = process.reverse_rates(probs, x, t) * rate
    assert float(rates.min()) >= 0
    assert float(rates.gather(-1, x[..., None]).abs().max()) == 0
    for name in ("theta_trapezoidal:theta=0.3", "theta_rk2"):
        is_kernel(trial_rows(transition(name), rates, x, step))
        is_kernel(second_rows(transition(name), rates, rates.flip(0), x, x.flip(0), step))


@given(SEEDS, st.floats(0.0, 1e4))
def test_jump_kernels_survive_any_rate(seed, scale):
    process, x, probs = scene(seed, False, SurvivalSchedule(), torch.float32)
    jumps = process.reverse_rates(probs, x, 0.5) * scale
    for rows in (euler_rows(jumps, x), tau_rows(jumps, x)):
        is_kernel(rows, 1e-5)


@given(SEEDS, st.floats(0.25, 8.0), st.floats(0.05, 1.0))
def test_sharpening_and_truncation(seed, exponent, top_p):
    _, _, probs = scene(seed, False, SurvivalSchedule())
    probs[0, 0] = torch.nn.functional.one_hot(torch.tensor(0), probs.shape[-1]).double()
    sharp = sharpen(probs, exponent)
    is_kernel(sharp)
    assert torch.equal(sharp > 0, probs > 0)
    torch.testing.assert_close(sharpen(sharp, 1.0 / exponent), probs, atol=1e-8, rtol=1e-6)
    cut = nucleus(probs, top_p)
    is_kernel(cut)
    kept = (probs * (cut > 0)).sum(-1)
    assert (kept >= min(top_p, 1.0) - 1e-9).all()
    assert torch.equal(cut.argmax(-1), probs.argmax(-1))


@given(SEEDS, st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_draws_have_positive_probability(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    probs = torch.rand(50, 6, 9, generator=generator).to(dtype)
    probs[torch.rand(probs.shape, generator=generator) < 0.6] = 0
    probs[..., 4] += 1e-3
    ids = draw(probs, generator)
    assert float(probs.gather(-1, ids[..., None]).min()) > 0

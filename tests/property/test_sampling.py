"""What must hold for every valid schedule, over random schedules with any mixture of options."""

import random
from collections.abc import Callable

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from samplers import Corrector, Engine, NoiseSchedule, SolverSchedule, StepStrategy, Tableau, iterate, sample
from samplers.testing import random_schedule

NOISE = (
    NoiseSchedule.vp_linear(),
    NoiseSchedule.vp_cosine(),
    NoiseSchedule.vp_discrete((1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)),
    NoiseSchedule.edm(),
    NoiseSchedule.flow(),
)
X = torch.randn(5, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
MEAN = torch.tensor([0.4, -0.2, 1.0], dtype=torch.float64)
SHIFT = torch.tensor([0.7, -1.5, 0.3], dtype=torch.float64)
ROTATION = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64))[0]
LARGEST = 1e4  # schedules may amplify rounding without bound (orders of 4 over huge steps); these are left out

Case = tuple[SolverSchedule, NoiseSchedule]


def _denoise(x: Tensor, t: Tensor) -> Tensor:
    """Nonlinear, coupling the coordinates of a sample and nothing else."""
    return x / (1 + x.square().sum(-1, keepdim=True)) + 0.3 * t / (1 + t) * x.flip(-1)


def cases(**options: bool) -> st.SearchStrategy[Case]:
    def make(seed: int) -> Case:
        rng = random.Random(seed)
        noise = rng.choice(NOISE)
        return random_schedule(rng, noise, **options), noise

    return st.integers(0, 2**32).map(make)


def _run(denoiser: Callable[[Tensor, Tensor], Tensor], x: Tensor, case: Case, mean: Tensor = MEAN) -> Tensor:
    schedule, noise = case
    tableau = Tableau.build(schedule, noise, first_x0=mean)
    rows = [*tableau.opening, *(row for stage in tableau.stages for row in stage.rows)]
    assume(max(abs(c) for row in rows for _, c in row.terms) < LARGEST)
    result = sample(denoiser, x, tableau, noise)
    assume(result.abs().max() < LARGEST)
    return result


def _close(a: Tensor, b: Tensor, limit: float = 1e-7) -> None:
    torch.testing.assert_close(a, b, rtol=limit, atol=limit)


@given(cases(pairs=False))
def test_a_constant_prediction_is_followed_exactly(case: Case) -> None:
    """If the network always answers c, the state ends where the straight path to c says, whatever the solver."""
    schedule, noise = case
    assume(schedule.steps[0].eval.source != "zero_x0")
    alpha, sigma = noise.alpha_sigma(schedule.times[0])
    alpha_to, sigma_to = noise.alpha_sigma(schedule.times[-1])
    result = _run(lambda x, t: MEAN.expand_as(x), X, case)
    _close(result, sigma_to / sigma * (X - alpha * MEAN) + alpha_to * MEAN)


@given(cases(pairs=False))
def test_shifting_the_data_shifts_the_samples(case: Case) -> None:
    schedule, noise = case
    assume(schedule.steps[0].eval.source != "zero_x0")

    def shifted(x: Tensor, t: Tensor) -> Tensor:
        return _denoise(x - noise.alpha(t) * SHIFT, t) + SHIFT

    result = _run(_denoise, X, case)
    moved = _run(shifted, X + noise.alpha(schedule.times[0]) * SHIFT, case, MEAN + SHIFT)
    _close(moved, result + noise.alpha(schedule.times[-1]) * SHIFT)


@given(cases(deltas=True))
def test_rotating_the_data_rotates_the_samples(case: Case) -> None:
    def rotated(x: Tensor, t: Tensor) -> Tensor:
        return _denoise(x @ ROTATION.mT, t) @ ROTATION

    _close(_run(rotated, X @ ROTATION, case, MEAN @ ROTATION), _run(_denoise, X, case) @ ROTATION)


@given(cases(deltas=True, clips=True))
def test_samples_of_a_batch_do_not_meet(case: Case) -> None:
    together = _run(_denoise, X, case)
    apart = torch.cat([_run(_denoise, x[None], case) for x in X])
    _close(together, apart, 1e-9)


@given(cases(deltas=True, clips=True), st.permutations(range(5)), st.integers(0, 12))
def test_permuting_in_the_middle_permutes_the_samples(case: Case, order: list[int], when: int) -> None:
    schedule, noise = case
    straight, index = _run(_denoise, X, case), torch.tensor(order)
    for position, engine in enumerate(iterate(_denoise, X, schedule, noise, first_x0=MEAN)):
        if position == min(when, schedule.nfe):
            engine.select(index)
    _close(engine.x, straight[index], 1e-9)


@given(cases(deltas=True), st.integers(0, 4), st.integers(0, 12))
def test_duplicated_samples_go_on_alike(case: Case, survivor: int, when: int) -> None:
    schedule, noise = case
    straight = _run(_denoise, X, case)
    for position, engine in enumerate(iterate(_denoise, X, schedule, noise, first_x0=MEAN)):
        if position == min(when, schedule.nfe):
            engine.select(torch.tensor([survivor, survivor]))
    _close(engine.x, straight[[survivor, survivor]], 1e-9)


@given(st.sampled_from(NOISE), st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 8))
def test_the_callers_edit_is_the_truth(noise: NoiseSchedule, kinds: list[int], when: int) -> None:
    """Under a constant x0-prediction a change of the state is carried on by sigma, through corrected states as well."""
    steps = []
    for i, kind in enumerate(kinds):
        order = min(1 + kind % 4, i + 1)
        corr = Corrector(order=order + 1, reeval=kind == 7) if kind > 4 and i < len(kinds) - 1 else None
        steps.append(StepStrategy(order=order, corr=corr, axis=("lambda", "t")[kind % 2]))
    lam = torch.linspace(-2.0, 2.0, len(kinds) + 1, dtype=torch.float64)
    schedule = SolverSchedule(times=tuple(noise.t_of_lam(lam).tolist()), steps=tuple(steps))
    straight = _run(lambda x, t: MEAN.expand_as(x), X, (schedule, noise))
    engine = Engine(Tableau.build(schedule, noise), X)
    when = min(when, schedule.nfe - 1)
    while (query := engine.query) is not None:
        x = engine.x + SHIFT if engine.position == when else engine.x
        if engine.position == when:
            carried = noise.sigma(schedule.times[-1]) / noise.sigma(query.t)
        engine.tell(MEAN.expand_as(x), x)
    _close(engine.x, straight + carried * SHIFT)


@given(cases(deltas=True, clips=True))
@settings(max_examples=50)
def test_every_evaluation_is_counted_and_every_state_shown(case: Case) -> None:
    schedule, noise = case
    calls: list[float] = []

    def counting(x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == ()
        assert t.dtype == torch.float64
        calls.append(t.item())
        return _denoise(x, t)

    result, states = sample(counting, X, schedule, noise, trajectory=True, first_x0=MEAN)
    assert len(calls) == schedule.nfe == Tableau.build(schedule, noise, first_x0=MEAN).nfe
    assert set(calls) <= set(schedule.times[:-1])
    assert len(states) == len(schedule.steps) + 1
    assert torch.equal(states[0], X)
    assert torch.equal(states[-1], result)

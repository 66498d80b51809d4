"""What the network is told (evaluation times), velocity form on flow models, and the noise of a scheduler's own seed."""

import copy
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from samplers import Evaluation, NoiseSchedule, SolverSchedule, StepStrategy, Tableau, recipe, sample
from samplers.schedulers import SolverScheduler
from samplers.schedulers.noising import noise_like

VP, EDM, FLOW = NoiseSchedule.vp_linear(), NoiseSchedule.edm(), NoiseSchedule.flow()
TIMES = (0.9, 0.6, 0.3, 0.0)


def _denoiser(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(1.3 * x) * 0.8 + 0.1 * torch.cos(3 * t).to(x)


def _shifted(**at: Evaluation) -> SolverSchedule:
    steps = tuple(StepStrategy(eval=at.get(f"step{i}", Evaluation())) for i in range(3))
    return SolverSchedule(times=TIMES, steps=steps)


@pytest.mark.parametrize("noise", [VP, FLOW], ids=["vp", "flow"])
def test_the_network_is_told_the_shifted_time(noise: NoiseSchedule) -> None:
    schedule = _shifted(
        step0=Evaluation(t_scale=1.05), step1=Evaluation(t_shift=-0.02), step2=Evaluation(t_scale=0.9, t_shift=0.01)
    )
    told, inputs = [0.945, 0.58, 0.28], []

    def record(x: Tensor, t: Tensor) -> Tensor:
        inputs.append((x, t.item()))
        return _denoiser(x, t)

    x = torch.randn(4, 3, dtype=torch.float64)
    out = sample(record, x, schedule, noise)
    assert [t for _, t in inputs] == pytest.approx(told, rel=1e-14)
    levels = [tuple(value.item() for value in noise.alpha_sigma(t)) for t in TIMES]
    for (alpha, sigma), (alpha_next, sigma_next), t in zip(levels[:-1], levels[1:], told, strict=True):
        x0 = _denoiser(x, torch.tensor(t, dtype=torch.float64))  # the step itself is between the state's own times
        x = alpha_next * x0 + sigma_next / sigma * (x - alpha * x0)
    torch.testing.assert_close(out, x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("i", "told"), [(0, Evaluation(t_scale=1.2)), (1, Evaluation(t_shift=0.41)), (2, Evaluation(t_shift=-0.31))]
)
def test_a_time_outside_is_refused_with_the_steps_name(i: int, told: Evaluation) -> None:
    with pytest.raises(ValueError, match=rf"steps\[{i}\]: evaluation time .* is outside \[0, 1\]"):
        Tableau.build(_shifted(**{f"step{i}": told}), VP)


def test_a_scheduler_publishes_the_times_it_asks_for() -> None:
    schedule = _shifted(step1=Evaluation(t_shift=-0.02))
    scheduler = SolverScheduler(schedule=schedule.to_dict(), prediction_type="sample")
    scheduler.set_timesteps(3)
    assert scheduler.timesteps.tolist() == pytest.approx([899, 579, 299])
    x = start = torch.randn(2, 3, 4, 4)
    for t in scheduler.timesteps:
        x = scheduler.step(_denoiser(x, (t + 1) / 1000), t, x).prev_sample
    native = sample(_denoiser, start, schedule, scheduler.noise_schedule)
    torch.testing.assert_close(x, native, rtol=1e-5, atol=1e-5)


# ---- velocity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [VP, NoiseSchedule.vp_cosine(), EDM], ids=lambda noise: noise.kind)
def test_velocity_needs_a_flow_model(noise: NoiseSchedule) -> None:
    schedule = SolverSchedule(times=(0.8, 0.4), steps=(StepStrategy(pred="flow", axis="t"),))
    with pytest.raises(ValueError, match="pred 'flow' needs a flow model"):
        Tableau.build(schedule, noise)
    Tableau.build(schedule, FLOW)
    for axis in ("lambda", "sigma"):
        with pytest.raises(ValueError, match="axes 't' and 'index'"):
            SolverSchedule(times=(0.8, 0.4), steps=(StepStrategy(pred="flow", axis=axis),))  # type: ignore[arg-type]


def _textbook_heun(slope: Callable[[Tensor, float], Tensor], x: Tensor, levels: list[float]) -> Tensor:
    for i, (a, b) in enumerate(itertools.pairwise(levels)):
        first = slope(x, a)
        x_next = x + (b - a) * first
        if i < len(levels) - 2:
            x_next = x + (b - a) * (first + slope(x_next, b)) / 2
        x = x_next
    return x


@pytest.mark.parametrize("noise", [FLOW, EDM], ids=["flow", "edm"])
@pytest.mark.parametrize("nfe", [1, 3, 9])
def test_heun_is_the_textbooks(nfe: int, noise: NoiseSchedule) -> None:
    """On velocities in t (flow), and arXiv:2206.00364, algorithm 1 (EDM): there the slope is (x - x0) / sigma."""
    schedule = recipe("heun", noise, nfe)
    assert len(schedule.steps) == (nfe + 1) // 2
    assert schedule.nfe == nfe

    def slope(x: Tensor, t: float) -> Tensor:  # with alpha = 1 - t it is eps - x0, the same expression
        return (x - _denoiser(x, torch.tensor(t, dtype=torch.float64))) / t

    x = torch.randn(5, 2, dtype=torch.float64) * noise.t_max
    torch.testing.assert_close(
        sample(_denoiser, x, schedule, noise), _textbook_heun(slope, x, list(schedule.times)), rtol=1e-11, atol=1e-11
    )


def test_lms_on_a_flow_is_adams_bashforth_on_the_velocity() -> None:
    schedule = recipe("lms:order=2", FLOW, 4)
    x, last = torch.randn(5, 2, dtype=torch.float64), None
    out = sample(_denoiser, x, schedule, FLOW)
    for a, b in itertools.pairwise(schedule.times):
        v = (x - _denoiser(x, torch.tensor(a, dtype=torch.float64))) / a
        slope = v if last is None else v + (b - a) / (a - last[0]) * (v - last[1]) / 2
        x, last = x + (b - a) * slope, (a, v)
    torch.testing.assert_close(out, x, rtol=1e-11, atol=1e-11)


# ---- seeds ---------------------------------------------------------------------------------------------------------------

STOCHASTIC = ["ddpm", "dpmpp:order=3,tau=1", "sa_solver", "restart", "lcm", "tcd", "euler_ancestral"]
MODELS: dict[str, dict[str, Any]] = {
    "vp": {},
    "flow": {"family": "flow", "prediction_type": "flow_prediction"},
}
models = pytest.mark.parametrize("model", MODELS)
X = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(1))


def _made(text: str, model: str = "vp", seed: int | None = None, nfe: int = 7) -> SolverScheduler:
    scheduler = SolverScheduler(**MODELS[model], schedule=text, noise_seed=seed)
    scheduler.set_timesteps(nfe)
    return scheduler


def _run(scheduler: SolverScheduler, x: Tensor, steps: slice = slice(None), generator: Any = None) -> Tensor:
    for t in scheduler.timesteps[steps]:
        output = torch.tanh(x) + 0.1 * math.cos(t.item())
        x = scheduler.step(output, t, x, generator=generator, return_dict=False)[0]
    return x


@models
@pytest.mark.parametrize("text", STOCHASTIC)
def test_a_seed_of_its_own(text: str, model: str) -> None:
    """Reproducible without a generator, without a trace in torch's own, and each image as if alone."""
    before = torch.get_rng_state()
    first = _run(_made(text, model, 3), X)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.isfinite().all()
    torch.rand(5)
    assert torch.equal(_run(_made(text, model, 3), X), first)
    assert not torch.equal(_run(_made(text, model, 4), X), first)
    assert torch.equal(_run(_made(text, model, 3), X[:2]), first[:2])
    same = _run(_made(text, model, 3), X[:1].expand(4, -1, -1, -1))
    assert (same.flatten(1)[1:] != same.flatten(1)[0]).any(1).all()  # the same start, another noise each


@pytest.mark.parametrize("text", STOCHASTIC)
def test_without_seed_or_generator_the_global_one_draws(text: str) -> None:
    torch.manual_seed(1)
    first = _run(_made(text), X)
    assert not torch.equal(_run(_made(text), X), first)
    torch.manual_seed(1)
    assert torch.equal(_run(_made(text), X), first)


def test_every_step_and_image_draws_its_own_noise() -> None:
    """With x0 = 0 a consistency step leaves sigma xi, so that the draws can be seen."""
    scheduler = SolverScheduler(schedule="lcm:final=sigma_min", prediction_type="sample", noise_seed=3)
    scheduler.set_timesteps(3)
    x, draws = X, []
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(torch.zeros_like(x), t, x).prev_sample
        sigma = scheduler.noise_schedule.sigma(scheduler.solver_schedule.times[i + 1]).item()
        draws.append((x / sigma).flatten(1))
        torch.testing.assert_close(draws[-1], noise_like(X, seed=3, step=i).flatten(1))
    assert torch.corrcoef(torch.cat(draws)).fill_diagonal_(0).abs().max() < 0.8


@models
@pytest.mark.parametrize("text", ["ddpm", "restart"])
def test_a_list_of_generators(text: str, model: str, generator: Callable[..., torch.Generator]) -> None:
    together = _run(_made(text, model, 9), X, generator=[generator(seed) for seed in range(4)])
    for b in range(4):
        alone = _run(_made(text, model), X[b : b + 1], generator=[generator(b)])
        torch.testing.assert_close(alone, together[b : b + 1])
    for count in (1, 2, 5):
        with pytest.raises(ValueError, match=f"{count} generators in a list for a batch of 4"):
            _run(_made(text, model), X, generator=[generator(seed) for seed in range(count)])


@models
@pytest.mark.parametrize("again", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("text", STOCHASTIC)
def test_copied_between_steps(text: str, again: Callable[[Any], Any], model: str, generator: Any) -> None:
    for seed, source in ((3, lambda: None), (None, generator)):
        whole = _run(_made(text, model, seed), X, generator=source())
        scheduler, own = _made(text, model, seed), source()
        x = _run(scheduler, X, slice(0, 3), own)
        other, state = again(scheduler), None if own is None else own.get_state()
        assert torch.equal(_run(scheduler, x, slice(3, None), own), whole)
        if own is not None:
            own.set_state(state)
        assert torch.equal(_run(other, x, slice(3, None), own), whole)

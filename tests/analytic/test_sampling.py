"""Whole runs against closed forms: mixtures, analytic first steps, residuals, precision, gradients."""

import itertools

import pytest
import torch
from torch import Tensor

from samplers import (
    Corrector,
    Evaluation,
    NoiseSchedule,
    Residual,
    SolverSchedule,
    StepStrategy,
    recipe,
    sample,
)
from samplers.denoisers import GaussianMixture, from_epsilon

VP, EDM, FLOW = NoiseSchedule.vp_linear(), NoiseSchedule.edm(), NoiseSchedule.flow()
FAMILIES = pytest.mark.parametrize("noise", [VP, EDM, FLOW], ids=lambda noise: noise.kind)
LAW = GaussianMixture(torch.tensor([[1.5, -0.5], [-1.0, 0.8]]), torch.tensor([0.3, 0.5]), torch.tensor([0.35, 0.65]))


def _x(n: int = 4, seed: int = 1) -> Tensor:
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@FAMILIES
@pytest.mark.parametrize("text", ["dpmpp:order=3", "unipc:order=3", "ipndm:order=4"])
def test_a_mixture_is_sampled_with_its_moments(noise: NoiseSchedule, text: str) -> None:
    n, schedule = 4000, recipe(text, noise, 40)
    x = noise.sigma(schedule.times[0]) * _x(n, seed=3)
    draws = sample(LAW.denoiser(noise), x, schedule, noise)
    error = 4 * (LAW.covariance.diagonal() / n).sqrt() + 0.01
    assert bool(((draws.mean(0) - LAW.mean).abs() < error).all())
    torch.testing.assert_close(draws.mT.cov(), LAW.covariance, rtol=0.06, atol=0.06)
    share = (draws[:, 0] > 0.4).double().mean().item()
    exact = (LAW.sample(100_000, torch.Generator().manual_seed(1))[:, 0] > 0.4).double().mean().item()
    assert share == pytest.approx(exact, abs=0.03)


@FAMILIES
def test_from_epsilon_equals_the_denoiser(noise: NoiseSchedule) -> None:
    def eps(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = noise.alpha_sigma(t)
        return -sigma * LAW.score(x, alpha, sigma)

    t_first = 0.98 * noise.t_max  # flow has no signal at 1, where eps says nothing
    times = tuple(t_first * (1 - k / 5) ** 2 for k in range(6))
    schedule = SolverSchedule(times=times, steps=recipe("unipc:order=2", noise, 5).steps)
    x = noise.sigma(t_first) * _x()
    direct = sample(LAW.denoiser(noise), x, schedule, noise)
    torch.testing.assert_close(sample(from_epsilon(eps, noise), x, schedule, noise), direct, rtol=1e-8, atol=1e-9)


# ---- analytic first step -------------------------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("pred", ["x0", "eps"])
@pytest.mark.parametrize("source", ["zero_x0", "average_x0"])
def test_analytic_first_step_is_its_formula(noise: NoiseSchedule, source: str, pred: str) -> None:
    first, second = 0.9 * noise.t_max, 0.5 * noise.t_max
    steps = (StepStrategy(pred=pred, eval=Evaluation(source=source)), StepStrategy(order=2, pred=pred))
    schedule = SolverSchedule(times=(first, second, 0.1 * noise.t_max), steps=steps)
    assert schedule.nfe == 1
    assert schedule.analytic_first_step
    x, mean, seen = _x() * noise.sigma(first), torch.tensor([0.3, -0.7], dtype=torch.float64), []

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x, t.item()))
        return LAW.denoiser(noise)(x, t)

    result, states = sample(denoiser, x, schedule, noise, trajectory=True, first_x0=mean)
    (alpha, sigma), (alpha_to, sigma_to) = noise.alpha_sigma(first), noise.alpha_sigma(second)
    if source == "average_x0":
        x0 = mean.expand_as(x)
        eps = (x - alpha * x0) / sigma
    else:
        eps = x if noise is VP else x / sigma
        x0 = (x - sigma * eps) / alpha
    torch.testing.assert_close(states[1], alpha_to * x0 + sigma_to * eps, rtol=1e-12, atol=1e-12)
    assert [t for _, t in seen] == [second]
    assert len(states) == 3
    # The analytic prediction stays in the history: the second step's derivative uses it.
    assert torch.equal(result, states[2])
    d1 = (_of(pred, noise, second, states[1], LAW) - (x0 if pred == "x0" else eps)) / (noise.lam(second) - noise.lam(first))
    alone = sample(LAW.denoiser(noise), states[1], _one_step(schedule, pred), noise)
    h = noise.lam(schedule.times[2]) - noise.lam(second)
    alpha_end, sigma_end = noise.alpha_sigma(schedule.times[2])
    weight = alpha_end * (h - 1 + torch.exp(-h)) if pred == "x0" else -sigma_end * (torch.exp(h) - 1 - h)
    torch.testing.assert_close(result, alone + weight * d1, rtol=1e-9, atol=1e-9)


def _of(pred: str, noise: NoiseSchedule, t: float, x: Tensor, law: GaussianMixture) -> Tensor:
    alpha, sigma = noise.alpha_sigma(t)
    x0 = law.denoiser(noise)(x, torch.tensor(t, dtype=torch.float64))
    return x0 if pred == "x0" else (x - alpha * x0) / sigma


def _one_step(schedule: SolverSchedule, pred: str) -> SolverSchedule:
    return SolverSchedule(times=schedule.times[1:], steps=(StepStrategy(pred=pred),))


# ---- trajectory, residual ------------------------------------------------------------------------------------------


def test_trajectory_holds_the_predicted_states() -> None:
    schedule = recipe("unipc:order=2", VP, 6)
    x, seen = _x(), []

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x)
        return LAW.denoiser(VP)(x, t)

    result, states = sample(denoiser, x, schedule, VP, trajectory=True)
    assert len(states) == 7
    assert torch.equal(states[0], x)
    assert torch.equal(states[-1], result)
    for state, evaluated in zip(states[:-1], seen, strict=True):  # the network sees predicted states
        assert torch.equal(state, evaluated)


def test_residual_adds_what_it_says() -> None:
    delta = Residual(x=(0.1, -0.2), x0=(0.0, 0.3, -0.4))
    plain = [StepStrategy(), StepStrategy(order=2), StepStrategy(order=2, pred="eps")]
    times = (0.9, 0.6, 0.4, 0.2)
    x, predictions = _x(), []

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        predictions.append(LAW.denoiser(VP)(x, t))
        return predictions[-1]

    base, states = sample(denoiser, x, SolverSchedule(times=times, steps=tuple(plain)), VP, trajectory=True)
    plain[2] = StepStrategy(order=2, pred="eps", delta=delta)
    changed = sample(LAW.denoiser(VP), x, SolverSchedule(times=times, steps=tuple(plain)), VP)
    expected = base + 0.1 * states[0] - 0.2 * states[1] + 0.3 * predictions[1] - 0.4 * predictions[2]
    torch.testing.assert_close(changed, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pred", ["x0", "eps"])
def test_reevaluating_correctors_evaluate_at_the_corrected_state(pred: str) -> None:
    steps = (StepStrategy(pred=pred, corr=Corrector(order=2, reeval=True)), StepStrategy(order=2, pred=pred))
    times = (0.9, 0.5, 0.2)
    schedule = SolverSchedule(times=times, steps=steps)
    assert schedule.nfe == 3
    x, seen = _x(), []

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x, t.item()))
        return LAW.denoiser(VP)(x, t)

    result = sample(denoiser, x, schedule, VP)
    assert [t for _, t in seen] == [0.9, 0.5, 0.5]
    # By hand: the corrector adds its derivative term; the next step sees the answer at the corrected state only.
    first, predicted, again = (_of(pred, VP, t, state, LAW) for state, t in seen)
    h, h_next = (VP.lam(b) - VP.lam(a) for a, b in itertools.pairwise(times))
    corrected = seen[1][0] + _second(pred, 0.5, h) * (predicted - first) / h
    torch.testing.assert_close(seen[2][0], corrected, rtol=1e-12, atol=1e-12)
    alone = sample(LAW.denoiser(VP), corrected, SolverSchedule(times=(0.5, 0.2), steps=(StepStrategy(),)), VP)
    expected = alone + _second(pred, 0.2, h_next) * (again - first) / h
    torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-11)


def _second(pred: str, t: float, h: Tensor) -> Tensor:
    """Weight of the first derivative in a step that ends at t."""
    alpha, sigma = VP.alpha_sigma(t)
    return alpha * (h - 1 + torch.exp(-h)) if pred == "x0" else -sigma * (torch.exp(h) - 1 - h)

"""The ends of time: no signal (alpha = 0) and no noise (sigma = 0) leave every recipe finite, at any NFE."""

import math

import pytest
import torch

from samplers import Evaluation, NoiseSchedule, SolverSchedule, StepStrategy, recipe, sample
from samplers.denoisers import GaussianMixture

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
ALPHAS_CUMPROD = (1 - BETAS).cumprod(0)
ROOTS = ALPHAS_CUMPROD.sqrt()
ZERO_SNR = ((ROOTS - ROOTS[-1]) * ROOTS[0] / (ROOTS[0] - ROOTS[-1])).square()  # arXiv:2305.08891, algorithm 1
NOISE = {
    "vp_linear": NoiseSchedule.vp_linear(),
    "vp_cosine": NoiseSchedule.vp_cosine(),
    "vp_discrete": NoiseSchedule.vp_discrete(ALPHAS_CUMPROD),
    "zero_snr": NoiseSchedule.vp_discrete(ZERO_SNR),
    "edm": NoiseSchedule.edm(),
    "flow": NoiseSchedule.flow(),
    "flow_shifted": NoiseSchedule.flow(3.0),
}
ALL = pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)
WILD = [  # finite, but they extrapolate the noise by e^h, far out at few steps
    "unipc:order=4,pred=eps,lower_order_final=false",
    "dpm:order=3,lower_order_final=false",
    "heun",
    "kdpm2",
]
TEXTS = [
    "ddim",
    "euler",
    "dpmpp:order=2",
    "dpmpp:order=2,method=singlestep,lower_order_final=false",
    "dpmpp:order=3,solver_type=heun,lower_order_final=false",
    "unipc:order=3,variant=bh1",
    *WILD,
    "deis:order=4,lower_order_final=false",
    "deis:order=4,axis=t,lower_order_final=false",
    "deis:order=4,axis=sigma,lower_order_final=false",
    "ipndm:order=4",
    "lms:order=4",
    "dpmpp:order=3,method=singlestep,lower_order_final=false",
    "sa_solver:order=3",
    "dpmpp:order=3,tau=1",
    "ddim:eta=1",
    "euler_ancestral",
    "ddpm",
    "restart",
    "lcm",
    "tcd",
]
LAW = GaussianMixture(torch.tensor([[1.0, -0.5], [-1.0, 0.5]]), torch.tensor([0.3, 0.1]))
X = torch.randn(4, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _end(text: str, noise: NoiseSchedule, nfe: int) -> torch.Tensor:
    schedule = recipe(text, noise, nfe)
    assert schedule.nfe == nfe
    x = X * noise.sigma(schedule.times[0])
    return sample(LAW.denoiser(noise), x, schedule, noise, first_x0=LAW.mean)


@ALL
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_every_recipe_is_finite_at_both_ends(text: str, noise: NoiseSchedule, final: str) -> None:
    for nfe in range(1, 7):
        result = _end(f"{text}{',' if ':' in text else ':'}final={final}", noise, nfe)
        assert bool(result.isfinite().all())
        assert text in WILD or result.abs().max() < 20


@ALL
@pytest.mark.parametrize("afs", ["zero_x0", "average_x0"])
@pytest.mark.parametrize("text", ["ddim:", "unipc:order=3,", "deis:order=3,axis=t,", "ipndm:"])
def test_analytic_first_steps_are_finite(text: str, noise: NoiseSchedule, afs: str) -> None:
    for nfe in (1, 2, 4):
        assert _end(f"{text}afs={afs}", noise, nfe).abs().max() < 20


@pytest.mark.parametrize("grid", ["linspace", "inclusive", "trailing", "leading", "lambda", "karras", "exponential"])
@ALL
def test_every_grid_is_finite(noise: NoiseSchedule, grid: str) -> None:
    for nfe in (1, 2, 5):
        assert _end(f"unipc:order=2,grid={grid}", noise, nfe).abs().max() < 20


@pytest.mark.parametrize("name", ["vp_cosine", "flow"])
@pytest.mark.parametrize("pred", ["x0", "eps"])
@pytest.mark.parametrize("axis", ["lambda", "sigma", "t"])
def test_the_no_signal_node_enters_derivatives(name: str, pred: str, axis: str) -> None:
    """A node at alpha = 0 counts as one at alpha / sigma = 1e-6."""
    noise = NOISE[name]
    steps = (StepStrategy(), StepStrategy(order=2, pred=pred, axis=axis), StepStrategy(order=3, pred=pred, axis=axis))

    def run(first: float) -> torch.Tensor:
        return sample(LAW.denoiser(noise), X, SolverSchedule(times=(first, 0.7, 0.4, 0.1), steps=steps), noise)

    assert bool(run(1.0).isfinite().all())
    almost = noise.t_of_lam(math.log(1e-6)).item()
    torch.testing.assert_close(run(1.0), run(almost), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pred", ["x0", "eps"])
@pytest.mark.parametrize("name", ["vp_cosine", "flow"])
def test_the_no_signal_node_has_a_definite_place(name: str, pred: str) -> None:
    """Order 2 by hand, with the first node's lambda at log(1e-6)."""
    noise, times = NOISE[name], (1.0, 0.7, 0.4)
    schedule = SolverSchedule(times=times, steps=(StepStrategy(), StepStrategy(order=2, pred=pred)))
    result, states = sample(LAW.denoiser(noise), X, schedule, noise, trajectory=True)
    seen = []
    for x, t in zip(states[:2], times, strict=False):
        x0 = LAW.denoiser(noise)(x, torch.tensor(t, dtype=torch.float64))
        alpha, sigma = noise.alpha_sigma(t)
        seen.append(x0 if pred == "x0" else (x - alpha * x0) / sigma)
    (alpha, sigma), (alpha_to, sigma_to) = noise.alpha_sigma(0.7), noise.alpha_sigma(0.4)
    h = noise.lam(0.4) - noise.lam(0.7)
    d1 = (seen[1] - seen[0]) / (noise.lam(0.7) - math.log(1e-6))
    if pred == "x0":
        expected = sigma_to / sigma * states[1] + alpha_to * (-torch.expm1(-h) * seen[1] + (h - 1 + torch.exp(-h)) * d1)
    else:
        expected = alpha_to / alpha * states[1] - sigma_to * (torch.expm1(h) * seen[1] + (torch.expm1(h) - h) * d1)
    torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-11)


@ALL
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("axis", ["lambda", "sigma", "t", "index"])
def test_noise_prediction_reaches_sigma_zero_continuously(noise: NoiseSchedule, axis: str, order: int) -> None:
    steps = tuple(StepStrategy(order=min(order, i + 1), pred="eps", axis=axis) for i in range(4))

    def run(end: float) -> torch.Tensor:
        times = tuple(noise.t_of_lam(torch.tensor([-2.0, -1.0, 0.0, 1.0], dtype=torch.float64)).tolist())
        return sample(LAW.denoiser(noise), X, SolverSchedule(times=(*times, end), steps=steps), noise)

    almost = noise.t_of_lam(20.0).item()
    torch.testing.assert_close(run(0.0), run(almost), rtol=1e-4, atol=1e-4)


@ALL
def test_one_step_to_zero_is_the_denoiser(noise: NoiseSchedule) -> None:
    t = torch.tensor(noise.t_max, dtype=torch.float64)
    x = X * noise.sigma(t)
    schedule = SolverSchedule(times=(noise.t_max, 0.0), steps=(StepStrategy(),))
    torch.testing.assert_close(
        sample(LAW.denoiser(noise), x, schedule, noise), LAW.denoiser(noise)(x, t), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("name", ["vp_cosine", "flow", "edm"])
@pytest.mark.parametrize("source", ["zero_x0", "average_x0"])
def test_a_schedule_without_any_evaluation(name: str, source: str) -> None:
    noise = NOISE[name]
    step = StepStrategy(eval=Evaluation(source=source))
    schedule = SolverSchedule(times=(noise.t_max, 0.0), steps=(step,))
    assert schedule.nfe == 0
    result = sample(lambda x, t: 1 / 0, X, schedule, noise, first_x0=LAW.mean)
    expected = torch.zeros_like(X) if source == "zero_x0" else LAW.mean.expand_as(X)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)

"""In-tree classes that draw from a Brownian tree (torchsde): the same rule with the same draws, the same law with their own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import CosineDPMSolverMultistepScheduler, DPMSolverSDEScheduler, SchedulerMixin
from diffusers.schedulers import scheduling_cosine_dpmsolver_multistep as cosine
from diffusers.schedulers import scheduling_dpmsolver_sde as sde
from torch import Tensor

from samplers.denoisers import GaussianMixture
from samplers.schedulers import SolverScheduler


class GlobalDraws:
    """In place of the Brownian tree: draws of the global generator, as ours when the pipeline passes none.

    Two increments from one start overlap: the second, to ``sigma_next``, contains the first.
    """

    def __init__(self, x: Tensor, *bounds: float, **options: Any) -> None:
        self.x, self.start, self.end, self.draw = x, float("nan"), 0.0, x

    def __call__(self, sigma: float, sigma_next: float) -> Tensor:
        start, end, draw = float(sigma), float(sigma_next), torch.randn_like(self.x)
        if start == self.start:
            shared = ((start - self.end) / (start - end)) ** 0.5
            draw = shared * self.draw + (1 - shared**2) ** 0.5 * draw
        self.start, self.end, self.draw = start, end, draw
        return draw


@pytest.fixture
def same_draws(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Tensor]], Tensor]:
    """``same_draws(run)``: its result, with the same noise every time."""
    for module in (cosine, sde):
        monkeypatch.setattr(module, "BrownianTreeNoiseSampler", GlobalDraws)

    def drawn(run: Callable[[], Tensor]) -> Tensor:
        torch.manual_seed(5)
        return run()

    return drawn


@pytest.mark.parametrize("n", [4, 10])
@pytest.mark.parametrize("options", [{}, {"prediction_type": "v_prediction"}], ids=str)
def test_dpmpp_sde(options: dict[str, Any], n: int, x: Tensor, tools: Any, same_draws: Callable[..., Tensor]) -> None:
    theirs = DPMSolverSDEScheduler(timestep_spacing="trailing", **options)
    ours = SolverScheduler.from_config(theirs.config, schedule="dpmpp_sde")
    theirs.set_timesteps(n)
    ours.set_timesteps(2 * n - 1)
    assert len(ours.timesteps) == len(theirs.timesteps)
    torch.testing.assert_close(ours.sigmas[::2], torch.cat([theirs.sigmas[:-1:2]]), rtol=1e-5, atol=0)
    scale = (theirs.sigmas[0] ** 2 + 1) ** 0.5
    expected = same_draws(lambda: tools.loop(theirs, x * scale, tools.timeless))
    got = same_draws(lambda: tools.loop(ours, x, tools.timeless))
    assert tools.relative(got, expected) < 5 * tools.limit  # their midpoint's sigma goes through exp and log in float32


@pytest.mark.parametrize("n", [2, 8])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("schedule", ["exponential", "karras"])
def test_cosine(schedule: str, order: int, n: int, x: Tensor, tools: Any, same_draws: Callable[..., Tensor]) -> None:
    theirs = CosineDPMSolverMultistepScheduler(solver_order=order, sigma_schedule=schedule, sigma_max=80.0)
    ours = SolverScheduler.from_config(theirs.config, schedule=f"dpmpp:order={order},tau=1")
    theirs.set_timesteps(n)
    ours.set_timesteps(n)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=2e-6, atol=0)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=2e-6, atol=0)
    start = x * float(theirs.init_noise_sigma)
    expected = same_draws(lambda: tools.loop(theirs, start))
    assert tools.relative(same_draws(lambda: tools.loop(ours, start)), expected) < tools.limit


@pytest.mark.filterwarnings("ignore:Should have t[ab][<>]=t[01]:UserWarning")
@pytest.mark.parametrize("n", [4, 12])
def test_the_law_of_cosine(n: int, generator: Callable[..., torch.Generator]) -> None:
    """On Gaussian data, with its own Brownian tree: mean and variance agree as far as 20000 images can tell."""
    images, mean, std = 20000, 0.7, 0.4
    law = GaussianMixture(torch.tensor([[mean]], dtype=torch.float64), torch.tensor([std], dtype=torch.float64))

    def result(scheduler: SchedulerMixin, seed: int) -> Tensor:
        scheduler.set_timesteps(n)
        noise, source = ours.noise_schedule, generator(seed + 1)
        x = torch.randn(images, 1, generator=generator(seed)) * float(scheduler.init_noise_sigma)
        for i, t in enumerate(scheduler.timesteps):
            sigma = scheduler.sigmas[i].double()
            scheduler.scale_model_input(x, t)
            x0 = law.denoiser(noise)(x.double(), noise.t_of_lam(-sigma.log()))
            root = (sigma**2 + 1) ** 0.5
            output = (x.double() - x0 * root**2) / (sigma * root)  # v-prediction, sigma_data = 1
            x = scheduler.step(output.float(), t, x, generator=source).prev_sample
        return x.double()

    theirs = CosineDPMSolverMultistepScheduler(sigma_max=80.0)
    ours = SolverScheduler.from_config(theirs.config, schedule="dpmpp:order=2,tau=1", noise_seed=4)
    a, b = result(theirs, 1), result(ours, 11)
    error = ((a.var() + b.var()) / images) ** 0.5
    assert abs(a.mean() - b.mean()) < 4 * error
    assert abs(a.var() - b.var()) < 4 * (2 * (a.var() ** 2 + b.var() ** 2) / images) ** 0.5
    assert abs(b.mean() - mean) < 0.05

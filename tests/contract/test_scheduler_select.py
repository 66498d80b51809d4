"""`SolverScheduler.select`: samples that are permuted or copied between two steps keep their own history."""

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from samplers.schedulers import SolverScheduler

INDEX = torch.tensor([2, 0, 0, 1])


def run(recipe: str, at: int | None) -> Tensor:
    """Four samples, each with a network of its own; ``at`` says before which step they follow `INDEX`."""
    scheduler = SolverScheduler.from_config(DDPMScheduler().config, schedule=recipe)
    scheduler.set_timesteps(6)
    x = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    slope = torch.linspace(0.2, 0.9, 4, dtype=torch.float64).reshape(4, 1, 1, 1)
    for i, t in enumerate(scheduler.timesteps):
        if i == at:
            x, slope = x[INDEX], slope[INDEX]
            scheduler.select(INDEX)
        x = scheduler.step(torch.tanh(slope * x), t, x).prev_sample
    return x


@pytest.mark.parametrize("recipe", ["ddim", "unipc:order=3", "dpmpp:order=3", "ipndm:order=4", "heun", "kdpm2"])
@pytest.mark.parametrize("at", [0, 1, 3, 5])
def test_histories_follow(recipe: str, at: int) -> None:
    torch.testing.assert_close(run(recipe, at), run(recipe, None)[INDEX], rtol=1e-12, atol=1e-12)

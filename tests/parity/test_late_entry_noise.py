"""Entry in the middle of a stochastic schedule: the first step loses its history, not its noise."""

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from samplers import Noise, NoiseSchedule, recipe
from samplers.schedulers import SolverScheduler


def run(scheduler: object, begin: int, x: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    scheduler.set_timesteps(8)
    scheduler.set_begin_index(begin)
    for t in scheduler.timesteps[begin:]:
        x = scheduler.step(torch.tanh(0.9 * x), t, x, generator=generator, return_dict=False)[0]
    return x


@pytest.mark.parametrize("begin", [1, 3, 7])
def test_sde_entry_equals_in_tree(begin: int) -> None:
    theirs = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=2)
    ours = SolverScheduler.from_config(theirs.config, schedule="dpmpp:order=2,tau=1")
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(run(ours, begin, x), run(theirs, begin, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("text", ["dpmpp:order=3,tau=0.5", "dpm:order=2,method=multistep,tau=0.5"])
def test_every_step_of_a_tail_keeps_its_noise(text: str) -> None:
    tail = recipe(text, NoiseSchedule.vp_linear(), 6).tail(2)
    assert tail.steps[0].order == 1
    assert {step.noise for step in tail.steps} == {Noise(kind="tau", amount=0.5)}

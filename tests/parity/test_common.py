"""What diffusers' per-class scheduler tests ask for, and the files beside this one do not: noise half-way, chains of configs,
a run's own times given back to it, grids of a thousand steps, flow models on named grids, odd betas."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SASolverScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from torch import Tensor

from samplers import NoiseSchedule, recipe
from samplers.schedulers import SolverScheduler

# ---- noise half-way --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theirs", "text"),
    [
        (DPMSolverMultistepScheduler(timestep_spacing="trailing"), "dpmpp:order=2"),
        (DPMSolverMultistepScheduler(timestep_spacing="trailing", solver_order=3), "dpmpp:order=3"),
        (UniPCMultistepScheduler(timestep_spacing="trailing"), "unipc:order=2"),
        (UniPCMultistepScheduler(timestep_spacing="trailing", solver_order=3), "unipc:order=3"),
        (DEISMultistepScheduler(timestep_spacing="trailing", solver_order=2), "deis:order=2,final=sigma_min"),
        (DEISMultistepScheduler(timestep_spacing="trailing", solver_order=3), "deis:order=3,final=sigma_min"),
        (SASolverScheduler(timestep_spacing="trailing"), "sa_solver"),
        (FlowMatchEulerDiscreteScheduler(shift=3.0), "euler"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, SchedulerMixin) else "",
)
@pytest.mark.parametrize("begin", [0, 5, 9])
def test_a_loop_that_begins_with_noise(theirs: SchedulerMixin, text: str, begin: int, x: Tensor, tools: Any) -> None:
    """Image to image without a pipeline: noise to the first timestep that is run, and the rest of the schedule.

    Multistep rules and correctors warm up there as they do at the schedule's own start.
    """
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    ours = SolverScheduler.from_config(theirs.config, schedule=text)
    results = []
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(10)
        scheduler.sigmas = scheduler.sigmas.double()  # theirs computes with them, and high-order weights cancel in float32
        scheduler.set_begin_index(begin)
        first = scheduler.timesteps[begin : begin + 1]
        flow = isinstance(theirs, FlowMatchEulerDiscreteScheduler)
        state = scheduler.scale_noise(x, first, noise) if flow else scheduler.add_noise(x, noise, first)
        for i, t in enumerate(scheduler.timesteps[begin:]):
            own = {"generator": torch.Generator().manual_seed(i)} if text == "sa_solver" else {}
            state = scheduler.step(tools.model(state, t), t, state, return_dict=False, **own)[0]
        results.append(state)
    assert tools.relative(results[1], results[0]) < tools.limit


# ---- configs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("through_files", [False, True])
def test_a_chain_of_classes(through_files: bool, x: Tensor, tools: Any, tmp_path: Path) -> None:
    """Ours, a class, ours, another class...: the last runs as the first did."""
    first = SolverScheduler.from_config(
        DPMSolverMultistepScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction").config,
        schedule="unipc:order=3",
    )
    scheduler: SchedulerMixin = first
    for i, cls in enumerate((UniPCMultistepScheduler, EulerDiscreteScheduler, DDPMScheduler, DPMSolverMultistepScheduler)):
        for kind in (cls, SolverScheduler):
            if through_files:
                scheduler.save_pretrained(tmp_path / f"{i}-{kind.__name__}")
                scheduler = kind.from_pretrained(tmp_path / f"{i}-{kind.__name__}")
            else:
                scheduler = kind.from_config(scheduler.config)
    results = []
    for one in (first, scheduler):
        one.set_timesteps(6)
        results.append(tools.loop(one, x))
    assert scheduler.config.schedule == "unipc:order=3"
    assert torch.equal(*results)


@pytest.mark.parametrize(
    "betas", [[0.1, 0.3], np.array([0.1, 0.3]), np.linspace(1e-4, 0.02, 1000)], ids=["list", "array", "1000"]
)
def test_trained_betas_from_another_class(betas: Any, tmp_path: Path) -> None:
    """In memory, through a file and back; there are as many training steps as betas, whatever the config says."""
    theirs = DDPMScheduler(trained_betas=betas)
    ours = SolverScheduler.from_config(theirs.config, schedule="ddim")
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    ours.save_pretrained(tmp_path)
    again = SolverScheduler.from_pretrained(tmp_path)
    assert torch.equal(again.alphas_cumprod, theirs.alphas_cumprod)
    assert torch.equal(DDPMScheduler.from_pretrained(tmp_path).betas, theirs.betas)
    again.set_timesteps(2)
    x = torch.ones(1, 3)
    for t in again.timesteps:
        x = again.step(torch.zeros_like(x), t, x).prev_sample
    assert x.isfinite().all()
    if len(betas) == 2:
        with pytest.raises(ValueError, match="num_inference_steps 3 is more than the 2 training steps"):
            again.set_timesteps(3)


# ---- times -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", [None, "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("text", ["dpmpp:order=2", "euler"])
@pytest.mark.parametrize("n", [2, pytest.param(300, marks=pytest.mark.slow)])
def test_times_of_long_runs_are_distinct(n: int, text: str, spacing: str, flag: str | None) -> None:
    """In-tree grids of many steps repeat timesteps, and their multistep rules divide by zero there."""
    options = {} if flag is None else {flag: True}
    ours = SolverScheduler(schedule=text, timestep_spacing=spacing, steps_offset=int(spacing == "leading"), **options)
    ours.set_timesteps(n)
    assert len(ours.timesteps) == n
    assert (ours.sigmas.diff() < 0).all()
    assert ours.solver_schedule is not None
    assert list(ours.solver_schedule.times) == sorted(set(ours.solver_schedule.times), reverse=True)


@pytest.mark.parametrize(
    "options",
    [{}, {"timestep_spacing": "leading", "steps_offset": 1}, {"family": "flow", "prediction_type": "flow_prediction"}],
    ids=["linspace", "leading", "flow"],
)
@pytest.mark.parametrize("text", ["dpmpp:order=2", "unipc:order=3", "ddim"])
def test_a_runs_own_times_given_back(text: str, options: dict[str, Any], x: Tensor, tools: Any) -> None:
    ours = SolverScheduler(schedule=text, **options)
    ours.set_timesteps(7)
    own, levels = ours.timesteps, ours.sigmas
    expected = tools.loop(ours, x)
    for given in (
        {"timesteps": own.tolist()},
        {"timesteps": own},
        {"sigmas": levels.tolist()},
        {"sigmas": levels.numpy()[:-1]},
    ):
        ours.set_timesteps(**given)
        torch.testing.assert_close(ours.timesteps, own, rtol=1e-5, atol=2e-3)
        assert tools.relative(tools.loop(ours, x), expected) < 1e-4


@pytest.mark.parametrize("flag", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
@pytest.mark.parametrize("n", [3, 10])
def test_flow_models_on_named_grids(n: int, flag: str) -> None:
    """As flow-match classes run them. The DPM-Solver kind reads the noise levels of its betas here, which no flow model has."""
    in_tree = FlowMatchEulerDiscreteScheduler(shift=3.0, **{flag: True})
    ours = SolverScheduler.from_config(in_tree.config, schedule="euler")
    in_tree.set_timesteps(n)
    ours.set_timesteps(n)
    torch.testing.assert_close(ours.sigmas, in_tree.sigmas, rtol=1e-5, atol=0)


# ---- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [int, float, torch.tensor, lambda t: torch.tensor([t]), lambda t: torch.tensor(int(t))])
def test_kinds_of_timesteps(kind: Any, x: Tensor) -> None:
    """A Python number, or a tensor of none or one dimension, of floats or of integers."""
    ours = SolverScheduler(timestep_spacing="trailing")
    ours.set_timesteps(5)
    t = ours.timesteps[2].item()
    assert ours.index_for_timestep(kind(t)) == 2
    expected = ours.step(0.1 * x, t, x).prev_sample
    ours.set_timesteps(5)
    assert ours.scale_model_input(x, kind(t)) is x
    assert torch.equal(ours.step(0.1 * x, kind(t), x).prev_sample, expected)
    assert torch.equal(
        ours.add_noise(x, x, torch.atleast_1d(torch.as_tensor(kind(t)))), ours.add_noise(x, x, ours.timesteps[2:3])
    )


def test_bad_values_are_named() -> None:
    with pytest.raises(ValueError, match="unknown family 'abc'; known: vp, edm, flow"):
        SolverScheduler(family="abc")
    with pytest.raises(ValueError, match="schedule must be recipe text, a path, a name, a dict or a SolverSchedule, got None"):
        SolverScheduler(schedule=None)
    ours = SolverScheduler()
    with pytest.raises(ValueError, match=r"sigmas begin at 500, above the 157\.407 of this model's first training step"):
        ours.set_timesteps(sigmas=[500.0, 3.0, 0.0])
    ours.set_timesteps(sigmas=[157.41, 3.0, 0.0])  # rounded, as published lists are


def test_a_schedule_object() -> None:
    found = recipe("unipc:order=2", NoiseSchedule.vp_linear(), 4)
    ours = SolverScheduler(schedule=found)
    assert ours.source == found
    assert ours.config.schedule == SolverScheduler(schedule=found.to_dict()).config.schedule


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), None])
def test_devices(device: Any) -> None:
    ours = SolverScheduler()
    ours.set_timesteps(5, device=device)
    assert ours.timesteps.device == torch.device("cpu")
    assert ours.timesteps.dtype == ours.sigmas.dtype == torch.float32
    ours.set_timesteps(5, device="meta")
    assert ours.timesteps.device.type == "meta"
    assert ours.sigmas.device.type == "cpu"  # as in-tree: pipelines read single values of it


@pytest.mark.parametrize("shape", [(3,), (3, 7), (3, 2, 4), (3, 2, 4, 4), (3, 2, 2, 4, 4)], ids=str)
def test_thresholding_of_any_rank(shape: tuple[int, ...], tools: Any) -> None:
    """Sample by sample: one's threshold does not depend on the others."""
    options = {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9}
    x = 3 * torch.randn(shape)

    def run(state: Tensor) -> Tensor:
        ours = SolverScheduler(schedule="ddim", **options)
        ours.set_timesteps(4)
        return tools.loop(ours, state)

    whole = run(x)
    assert whole.shape == shape
    for i in range(3):
        torch.testing.assert_close(run(x[i : i + 1]), whole[i : i + 1], rtol=1e-5, atol=1e-6)
    assert tools.relative(whole, tools.loop(_plain(4), x)) > 1e-3


def _plain(n: int) -> SolverScheduler:
    ours = SolverScheduler(schedule="ddim")
    ours.set_timesteps(n)
    return ours

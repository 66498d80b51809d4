"""The native loop and the diffusers scheduler are one engine: the same outputs at the same times give the same bits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import save_file
from torch import Tensor

from samplers import NoiseSchedule, SolverSchedule, StepStrategy, sample
from samplers.denoisers import from_epsilon
from samplers.parametrization import to_x0
from samplers.schedulers import SolverScheduler

RECIPES = [
    "ddim",
    "ddim:clip=0.8",
    "ddim:afs=zero_x0",
    "euler",
    "dpmpp:order=2",
    "dpmpp:order=3,taylor=true",
    "dpmpp_2s",
    "dpmpp:order=3,afs=zero_x0",
    "unipc:order=1",
    "unipc:order=3",
    "unipc:order=2,variant=bh1,afs=zero_x0",
    "unipc:order=3,pred=eps,final=sigma_min",
    "deis:order=3",
    "deis:order=2,axis=sigma",
    "ipndm",
]
MODELS = {
    "vp": {},
    "vp-v": {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing"},
    "flow": {"family": "flow", "prediction_type": "flow_prediction", "shift": 3.0},
    "edm": {"family": "edm", "sigma_data": 0.5},
}
DTYPES = [torch.float32, torch.float64]

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def _scheduler(model: str, recipe: str | dict[str, Any], nfe: int) -> SolverScheduler:
    scheduler = SolverScheduler(**MODELS[model], schedule=recipe)
    scheduler.set_timesteps(nfe)
    return scheduler


def _denoiser(scheduler: SolverScheduler, model: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """``model`` as a native denoiser, given what the scheduler gives it."""
    noise, config = scheduler.noise_schedule, scheduler.model_config

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (value.item() for value in noise.alpha_sigma(t))
        data = config.sigma_data
        model_input = x if data is None else x * (sigma**2 + data**2) ** -0.5
        output = model(model_input, noise.timestep(t).to(torch.float32))
        return to_x0(output, x, alpha, sigma, config.prediction_type, data)

    return denoise


@every_dtype
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("model", MODELS)
def test_native_equals_the_scheduler(model: str, recipe: str, dtype: torch.dtype, x: Tensor, tools: Any) -> None:
    scheduler = _scheduler(model, recipe, 7)
    start = x.to(dtype) * scheduler.init_noise_sigma
    by_scheduler = tools.loop(scheduler, start)
    assert scheduler.solver_schedule.nfe == 7
    native = sample(_denoiser(scheduler, tools.model), start, scheduler.solver_schedule, scheduler.noise_schedule)
    assert native.dtype == dtype
    assert native.isfinite().all()
    assert torch.equal(native, by_scheduler)


@every_dtype
@pytest.mark.parametrize("recipe", RECIPES)
def test_from_epsilon_with_the_configs_noise_schedule(recipe: str, dtype: torch.dtype, x: Tensor, tools: Any) -> None:
    """The public way: a noise prediction and ``NoiseSchedule.from_config``."""
    config = DDPMScheduler(beta_schedule="scaled_linear", clip_sample=False).config
    scheduler = SolverScheduler.from_config(config, schedule=recipe)
    scheduler.set_timesteps(6)
    noise = NoiseSchedule.from_config(config)
    denoiser = from_epsilon(lambda state, t: tools.model(state, noise.timestep(t).to(torch.float32)), noise)
    start = x.to(dtype)
    native = sample(denoiser, start, scheduler.solver_schedule, noise)
    assert torch.equal(native, tools.loop(scheduler, start))


@pytest.mark.parametrize("model", MODELS)
def test_other_times_give_other_bits(model: str, x: Tensor, tools: Any) -> None:
    """The equality above is not vacuous."""
    scheduler = _scheduler(model, "dpmpp", 7)
    start = x * scheduler.init_noise_sigma
    by_scheduler = tools.loop(scheduler, start)
    times = list(scheduler.solver_schedule.times)
    times[3] *= 1.001
    moved = SolverSchedule(times=tuple(times), steps=scheduler.solver_schedule.steps)
    native = sample(_denoiser(scheduler, tools.model), start, moved, scheduler.noise_schedule)
    assert not torch.equal(native, by_scheduler)


@pytest.mark.parametrize("model", MODELS)
def test_a_schedule_from_a_file(model: str, x: Tensor, tools: Any, tmp_path: Path) -> None:
    """A fixed schedule, saved and loaded, gives what the recipe gave."""
    scheduler = _scheduler(model, "unipc:order=3", 5)
    start = x * scheduler.init_noise_sigma
    scheduler.solver_schedule.save(tmp_path / "five.json")
    fixed = _scheduler(model, str(tmp_path / "five.json"), 5)
    assert fixed.solver_schedule == scheduler.solver_schedule
    by_file = tools.loop(fixed, start)
    assert torch.equal(by_file, tools.loop(scheduler, start))
    loaded = SolverSchedule.load(tmp_path / "five.json")
    assert torch.equal(sample(_denoiser(fixed, tools.model), start, loaded, fixed.noise_schedule), by_file)


@every_dtype
def test_the_datas_mean_as_first_prediction(dtype: torch.dtype, x: Tensor, tools: Any, tmp_path: Path) -> None:
    mean = torch.linspace(-1, 1, x[0].numel()).reshape(x.shape[1:])
    save_file({"mean": mean}, tmp_path / "mean.safetensors")
    scheduler = SolverScheduler(schedule="dpmpp:afs=average_x0", first_x0=str(tmp_path / "mean.safetensors"))
    scheduler.set_timesteps(4)
    start = x.to(dtype)
    by_scheduler = tools.loop(scheduler, start)
    schedule, noise = scheduler.solver_schedule, scheduler.noise_schedule
    denoiser = _denoiser(scheduler, tools.model)
    assert torch.equal(sample(denoiser, start, schedule, noise, first_x0=mean), by_scheduler)
    assert not torch.equal(sample(denoiser, start, schedule, noise, first_x0=-mean), by_scheduler)


def test_a_corrector_that_asks_again(x: Tensor, tools: Any) -> None:
    """A second evaluation at the same time is an entry of ``timesteps`` like any other."""
    base = _scheduler("vp", "unipc:order=2", 4).solver_schedule.to_dict()
    base["steps"][1]["corr"]["reeval"] = True
    base["nfe"] = 5
    scheduler = _scheduler("vp", base, 5)
    assert len(scheduler.timesteps) == 5
    assert scheduler.timesteps[2] == scheduler.timesteps[3]
    by_scheduler = tools.loop(scheduler, x)
    native = sample(_denoiser(scheduler, tools.model), x, scheduler.solver_schedule, scheduler.noise_schedule)
    assert torch.equal(native, by_scheduler)


def test_a_schedule_of_mixed_steps(x: Tensor, tools: Any) -> None:
    """Steps of every kind in one schedule."""
    times = (1.0, 0.8, 0.55, 0.35, 0.15, 0.0)
    steps = (
        StepStrategy(order=1),
        StepStrategy(order=2, pred="eps", axis="t"),
        StepStrategy(order=2, start=-2, relax=("bh2",)),
        StepStrategy(order=3, pred=(0.5, -0.5), relax=(0.1, None)),
        StepStrategy(order=1, keep_eps=True),
    )
    schedule = SolverSchedule(times=times, steps=steps, clip=0.9)
    scheduler = _scheduler("vp", schedule.to_dict(), 5)
    by_scheduler = tools.loop(scheduler, x)
    native = sample(_denoiser(scheduler, tools.model), x, schedule, scheduler.noise_schedule)
    assert torch.equal(native, by_scheduler)

"""What diffusers' own scheduler tests ask of every scheduler, and what pipelines do to one between steps."""

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from torch import Tensor

from samplers.schedulers import SolverScheduler

RECIPES = ["ddim", "dpmpp:order=2", "unipc:order=3", "deis:order=3", "dpmpp_2s", "ipndm"]
FAMILIES: dict[str, dict[str, Any]] = {
    "vp": {},
    "flow": {"family": "flow", "prediction_type": "flow_prediction", "shift": 3.0},
    "edm": {"family": "edm", "sigma_data": 0.5},
}
every_family = pytest.mark.parametrize("family", FAMILIES)
every_recipe = pytest.mark.parametrize("recipe", RECIPES)


def _ready(family: str = "vp", recipe: str = "dpmpp:order=2", steps: int = 10, **options: Any) -> SolverScheduler:
    scheduler = SolverScheduler(**FAMILIES[family], schedule=recipe, **options)
    scheduler.set_timesteps(steps)
    return scheduler


# ---- the common test of diffusers ----------------------------------------------------------------------------------


@every_family
@every_recipe
def test_two_steps_keep_the_shape(family: str, recipe: str, x: Tensor) -> None:
    """Also when both get the same sample, which a pipeline never does."""
    scheduler = _ready(family, recipe)
    first = scheduler.step(0.1 * x, scheduler.timesteps[0], x).prev_sample
    second = scheduler.step(0.1 * x, scheduler.timesteps[1], x).prev_sample
    assert first.shape == second.shape == x.shape
    assert not torch.equal(first, second)


@every_family
@every_recipe
def test_tuple_equals_dataclass_and_set_timesteps_resets(family: str, recipe: str, x: Tensor, tools: Any) -> None:
    scheduler = _ready(family, recipe)
    for t in scheduler.timesteps[:3]:
        expected = scheduler.step(tools.model(x, t), t, x)
    scheduler.set_timesteps(10)
    assert scheduler.step_index is None
    assert scheduler.begin_index is None
    for t in scheduler.timesteps[:3]:
        result = scheduler.step(tools.model(x, t), t, x, return_dict=False)
    assert torch.equal(result[0], expected.prev_sample)
    assert torch.equal(result[1], expected.pred_original_sample)
    assert list(expected.keys()) == ["prev_sample", "pred_original_sample"]


@every_family
def test_scale_model_input_before_set_timesteps(family: str, x: Tensor) -> None:
    scheduler = SolverScheduler(**FAMILIES[family])
    assert scheduler.scale_model_input(x, 0.0).shape == x.shape
    assert float(scheduler.init_noise_sigma) > 0
    assert len(scheduler) == 1000


@every_family
def test_add_noise_at_a_timestep_of_the_run(family: str, x: Tensor) -> None:
    scheduler = _ready(family, steps=50)
    noise = torch.ones_like(x)
    out = scheduler.add_noise(x, noise, scheduler.timesteps[5][None])
    alpha, sigma = scheduler.noise_schedule.alpha_sigma(scheduler.solver_schedule.times[5])
    torch.testing.assert_close(out, (alpha * x + sigma * noise).float(), rtol=2e-6, atol=1e-6)


def test_compatibles() -> None:
    """To every one of them and back, the config is the same, and so is what in it was said and what was implied."""
    ours = SolverScheduler(num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    classes = [cls for cls in ours.compatibles if issubclass(cls, SchedulerMixin)]  # not those whose library is missing
    assert len(classes) > 10
    for cls in classes:
        back = SolverScheduler.from_config(cls.from_config(ours.config).config)
        assert {key: value for key, value in back.config.items() if key in ours.config} == dict(ours.config), cls


@pytest.mark.parametrize("betas", [np.array([0.1, 0.3]), [0.1, 0.3]])
@every_family
def test_trained_betas(family: str, betas: Any) -> None:
    """Their number need not be num_train_timesteps."""
    scheduler = SolverScheduler(**FAMILIES[family], trained_betas=betas)
    assert np.allclose(scheduler.betas.numpy(), [0.1, 0.3])


def test_signatures() -> None:
    """Pipelines look for parameters by name, and count ``**kwargs`` as none."""
    timesteps = inspect.signature(SolverScheduler.set_timesteps).parameters
    assert list(timesteps)[1:] == ["num_inference_steps", "device", "timesteps", "sigmas", "mu"]
    assert {"model_output", "timestep", "sample", "generator", "return_dict"} < set(
        inspect.signature(SolverScheduler.step).parameters
    )
    kinds = {p.kind for p in inspect.signature(SolverScheduler.__init__).parameters.values()}
    assert inspect.Parameter.VAR_KEYWORD not in kinds
    assert SolverScheduler.order == 1


def test_attributes_of_the_config() -> None:
    with pytest.warns(FutureWarning, match="num_train_timesteps"):
        assert SolverScheduler().num_train_timesteps == 1000
    with pytest.raises(AttributeError, match="'SolverScheduler' object has no attribute 'does_not_exist'"):
        _ = SolverScheduler().does_not_exist


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 50, 999, 1000])
def test_any_number_of_steps(steps: int, x: Tensor, tools: Any) -> None:
    scheduler = _ready("vp", "dpmpp:order=3", steps)
    assert len(scheduler.timesteps) == scheduler.num_inference_steps == steps
    assert len(scheduler.sigmas) == steps + 1
    if steps < 100:
        assert tools.loop(scheduler, x).isfinite().all()


# ---- noising -----------------------------------------------------------------------------------------------------


def test_add_noise_and_velocity_values(x: Tensor) -> None:
    theirs = DDPMScheduler(beta_schedule="scaled_linear")
    ours = SolverScheduler.from_config(theirs.config)
    noise, t = torch.randn_like(x), torch.tensor([3, 870])
    torch.testing.assert_close(ours.add_noise(x, noise, t), theirs.add_noise(x, noise, t), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.scale_noise(x, t, noise), theirs.add_noise(x, noise, t), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.get_velocity(x, noise, t), theirs.get_velocity(x, noise, t), rtol=1e-5, atol=1e-6)


def test_scale_noise_of_flow_models(x: Tensor) -> None:
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = SolverScheduler.from_config(theirs.config)
    theirs.set_timesteps(10)
    ours.set_timesteps(10)
    noise, t = torch.randn_like(x), theirs.timesteps[[4, 4]]
    torch.testing.assert_close(ours.scale_noise(x, t, noise), theirs.scale_noise(x, t, noise))
    assert torch.equal(ours.add_noise(x, noise, t), ours.scale_noise(x, t, noise))
    assert torch.equal(ours.get_velocity(x, noise, t), noise - x)


def test_noise_keeps_the_dtype_of_the_samples(x: Tensor) -> None:
    scheduler = _ready()
    assert scheduler.add_noise(x.half(), torch.ones_like(x), scheduler.timesteps[:1]).dtype == torch.float16


# ---- where a run begins ------------------------------------------------------------------------------------------


def test_index_for_timestep() -> None:
    """The second where a timestep occurs twice, the last where it does not occur."""
    scheduler = _ready(steps=5)
    grid = torch.tensor([900.0, 700.0, 700.0, 700.0, 100.0])
    assert [scheduler.index_for_timestep(t, grid) for t in (900, 700.0, torch.tensor(100), 55)] == [0, 2, 4, 4]
    assert scheduler.index_for_timestep(scheduler.timesteps[3]) == 3


@pytest.mark.parametrize("begin", [0, 3, 9])
@pytest.mark.parametrize("by_index", [True, False])
def test_entry_in_the_middle(begin: int, by_index: bool, x: Tensor, tools: Any) -> None:
    """The first step from there is of first order, and everything is as in the in-tree class of order 2."""
    theirs, ours = tools.pair(DPMSolverMultistepScheduler, "dpmpp:order=2", {}, 10)
    for scheduler in (theirs, ours):
        if by_index:
            scheduler.set_begin_index(begin)
    results = []
    for scheduler in (theirs, ours):
        state = x
        for t in scheduler.timesteps[begin:]:
            state = scheduler.step(tools.model(state, t), t, state, return_dict=False)[0]
        results.append(state)
    assert tools.relative(results[1], results[0]) < tools.limit
    assert ours.step_index == 10


@every_recipe
def test_the_first_step_in_the_middle_is_of_first_order(recipe: str, x: Tensor, tools: Any) -> None:
    """Unlike the same step of a whole run."""
    results = []
    for text in (recipe, "ddim"):
        scheduler = _ready("vp", f"{text}{',' if ':' in text else ':'}grid=linspace", 8)
        scheduler.set_begin_index(4)
        t = scheduler.timesteps[4]
        results.append(scheduler.step(tools.model(x, t), t, x).prev_sample)
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("recipe", ["dpmpp:order=2", "dpmpp:order=3", "deis:order=3", "ipndm"])
def test_a_step_with_history_is_not(recipe: str, x: Tensor, tools: Any) -> None:
    whole, entered = _ready("vp", recipe, 8), _ready("vp", recipe, 8)
    state = x
    for t in whole.timesteps[:5]:
        before, state = state, whole.step(tools.model(state, t), t, state).prev_sample
    alone = entered.step(tools.model(before, t), t, before).prev_sample
    assert tools.relative(alone, state) > 1e-4


def test_begin_index_outside_the_schedule(x: Tensor) -> None:
    scheduler = _ready()
    scheduler.set_begin_index(10)
    with pytest.raises(ValueError, match="begin index 10 is outside the 10 steps"):
        scheduler.step(x, scheduler.timesteps[-1], x)

"""What happens to a scheduler and to its tensors in the middle of a run: copies, edits, dtypes, shapes, misuse."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from samplers.schedulers import SolverScheduler

RECIPES = ["ddim:clip=0.8", "dpmpp:order=2", "unipc:order=3", "deis:order=3", "dpmpp_2s", "ipndm", "ddim:afs=zero_x0"]
every_recipe = pytest.mark.parametrize("recipe", RECIPES)
every_family = pytest.mark.parametrize("family", ["vp", "flow", "edm"])
CLIPPED = [{"clip_sample": True}, {"thresholding": True}]


def _ready(recipe: str = "dpmpp:order=2", steps: int = 6, family: str = "vp", **options: Any) -> SolverScheduler:
    if family == "flow":
        options["prediction_type"] = "flow_prediction"
    scheduler = SolverScheduler(family=family, schedule=recipe, **options)
    scheduler.set_timesteps(steps)
    return scheduler


def _run(scheduler: SolverScheduler, x: Tensor, tools: Any, first: int = 0, last: int | None = None) -> Tensor:
    for t in scheduler.timesteps[first:last]:
        output = tools.model(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(output, t, x, return_dict=False)[0]
    return x


# ---- copies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["deepcopy", "pickle"])
@every_recipe
def test_a_copy_between_steps_goes_on_by_itself(
    recipe: str, make: Callable[[SolverScheduler], SolverScheduler], x: Tensor, tools: Any
) -> None:
    scheduler = _ready(recipe)
    middle = _run(scheduler, x, tools, 0, 3)
    twin = make(scheduler)
    expected = _run(scheduler, middle, tools, 3)
    assert twin.step_index == 3
    assert torch.equal(_run(twin, middle, tools, 3), expected)
    assert twin.config == scheduler.config


@pytest.mark.parametrize("options", CLIPPED, ids=str)
def test_copies_of_clipping_schedulers(options: dict[str, Any], x: Tensor, tools: Any) -> None:
    scheduler = _ready("ddim", **options)
    middle = _run(scheduler, x, tools, 0, 3)
    twin = pickle.loads(pickle.dumps(scheduler))
    expected = _run(scheduler, middle, tools, 3)
    assert torch.equal(_run(twin, middle, tools, 3), expected)


# ---- the caller's latents are the truth ------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 2, 4])
def test_edited_latents_are_honoured(at: int, x: Tensor, tools: Any) -> None:
    """As in the in-tree class: history keeps the predictions, the state is the caller's."""
    theirs, ours = tools.pair(DPMSolverMultistepScheduler, "dpmpp:order=2", {}, 6)
    results = []
    for scheduler in (theirs, ours):
        state = x
        for i, t in enumerate(scheduler.timesteps):
            if i == at:
                state = 0.5 * state + 1.0
            state = scheduler.step(tools.model(state, t), t, state, return_dict=False)[0]
        results.append(state)
    assert tools.relative(results[1], results[0]) < tools.limit
    untouched = _run(_ready(), x, tools)
    assert tools.relative(untouched, results[0]) > 1e-2


def test_the_callers_tensors_are_left_alone(x: Tensor, tools: Any) -> None:
    scheduler = _ready("unipc:order=3")
    state = x
    for t in scheduler.timesteps:
        output = tools.model(state, t)
        before = state.clone(), output.clone()
        after = scheduler.step(output, t, state).prev_sample
        assert torch.equal(state, before[0])
        assert torch.equal(output, before[1])
        state = after


# ---- dtypes and shapes -----------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_recipe
def test_half_precision_latents(recipe: str, dtype: torch.dtype, family: str, x: Tensor, tools: Any) -> None:
    """Latents keep their dtype; the arithmetic is float32, so a run stays near the float32 one."""
    half, full = _ready(recipe, family=family), _ready(recipe, family=family)
    start = x.to(dtype) * full.init_noise_sigma
    result = _run(half, start, tools)
    assert result.dtype == dtype
    assert half.step_index == 6
    expected = _run(full, start.float(), tools)
    assert tools.relative(result.float(), expected) < 20 * torch.finfo(dtype).eps


def test_the_sums_are_in_float32(x: Tensor) -> None:
    """One step rounds once: exactly the float32 step of the same tensors."""
    half, full = _ready("dpmpp"), _ready("dpmpp")
    state, output = x.half(), torch.sin(3 * x).half()
    t = half.timesteps[0]
    expected = full.step(output.float(), t, state.float()).prev_sample.half()
    assert torch.equal(half.step(output, t, state).prev_sample, expected)


@pytest.mark.parametrize("shape", [(2, 5), (2,), (3, 2, 4), (2, 3, 4, 4), (1, 2, 3, 4, 4), (1, 7)], ids=str)
@every_recipe
def test_latents_of_any_rank(recipe: str, shape: tuple[int, ...], tools: Any) -> None:
    """Each value's result does not depend on the shape it lies in."""
    x = torch.randn(shape)
    result = _run(_ready(recipe), x, tools)
    assert result.shape == shape
    flat = _run(_ready(recipe), x.reshape(1, -1), tools)
    torch.testing.assert_close(result.reshape(1, -1), flat, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, *CLIPPED], ids=str)
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_batches(batch: int, options: dict[str, Any], x: Tensor, tools: Any) -> None:
    """Images do not see each other, and an empty batch is one."""
    x = torch.randn(batch, 3, 4, 4)
    result = _run(_ready("ddim", **options), x, tools)
    assert result.shape == x.shape
    for i in range(batch):
        alone = _run(_ready("ddim", **options), x[i : i + 1], tools)
        torch.testing.assert_close(result[i : i + 1], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["learned", "learned_range"])
def test_learned_variance_is_dropped(kind: str, x: Tensor) -> None:
    learned, plain = _ready(variance_type=kind), _ready()
    output = torch.sin(x)
    t = plain.timesteps[0]
    both = torch.cat([output, torch.full_like(output, 7.0)], dim=1)
    assert torch.equal(learned.step(both, t, x).prev_sample, plain.step(output, t, x).prev_sample)


# ---- misuse ----------------------------------------------------------------------------------------------------------


def test_misuse_is_named(x: Tensor, tools: Any) -> None:
    with pytest.raises(RuntimeError, match="call set_timesteps before step"):
        SolverScheduler().step(x, 0, x)
    scheduler = _ready()
    with pytest.raises(ValueError, match=r"model_output has shape \(2, 3, 8, 4\), sample \(2, 3, 8, 8\)"):
        scheduler.step(x[..., :4], scheduler.timesteps[0], x)
    scheduler.set_timesteps(2)
    _run(scheduler, x, tools)
    with pytest.raises(RuntimeError, match="all 2 steps are done; call set_timesteps"):
        scheduler.step(x, scheduler.timesteps[-1], x)
    opened = _ready("ddim:afs=zero_x0")
    with pytest.raises(RuntimeError, match="did not call scale_model_input"):
        opened.step(x, opened.timesteps[0], x)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_numbers_of_steps(steps: int) -> None:
    with pytest.raises(ValueError, match=f"{steps}"):
        SolverScheduler().set_timesteps(steps)


def test_contradicting_times() -> None:
    scheduler = SolverScheduler()
    with pytest.raises(ValueError, match="timesteps or sigmas, not both"):
        scheduler.set_timesteps(timesteps=[900, 500], sigmas=[3.0, 1.0])
    with pytest.raises(ValueError, match="num_inference_steps is 3, but 2 times were given"):
        scheduler.set_timesteps(3, timesteps=[900, 500])
    with pytest.raises(ValueError, match="needs num_inference_steps, timesteps or sigmas"):
        scheduler.set_timesteps()
    with pytest.raises(ValueError, match="times must strictly decrease"):
        scheduler.set_timesteps(timesteps=[500, 900])

"""Inside the loop of unmodified pipelines: an analytic first step, callbacks, generators, half precision."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from tiny_pipelines.harness import relative
from torch import Tensor

from samplers.schedulers import SolverScheduler, swap

PIPELINES = ["sd", "sdxl", "dit", "ddpm", "sd3", "flux"]
OPENS_BY_ITSELF = ["sd", "sdxl", "dit"]  # pipelines that call scale_model_input
ANALYTIC = ["ddim:grid=trailing", "dpmpp:order=3,grid=trailing", "unipc:order=2,grid=trailing"]


def _swapped(tiny: Any, schedule: str) -> Any:
    tiny.pipe.scheduler = SolverScheduler.from_config(tiny.pipe.scheduler.config, schedule=schedule)
    return tiny


def _in_tree(tiny: Any, order: int = 2) -> Any:
    tiny.pipe.scheduler = DPMSolverMultistepScheduler.from_config(tiny.pipe.scheduler.config, solver_order=order)
    return tiny


# ---- an analytic first step ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ANALYTIC)
@pytest.mark.parametrize("name", PIPELINES)
def test_an_analytic_first_step_costs_no_evaluation(name: str, text: str, build: Callable[[str], Any]) -> None:
    """It is the run of one evaluation more whose first answer says that the state is noise, and nothing else."""
    tiny = build(name)
    with swap(tiny.pipe, text), tiny.first_answer_is_the_input(), tiny.counting() as batches:
        expected = tiny(5)
    assert len(batches) == 5
    with swap(tiny.pipe, f"{text},afs=zero_x0"), tiny.counting() as batches:
        out = tiny(4)
        again = tiny(4)
    assert batches == [tiny.rows] * 8
    assert torch.equal(out, again)
    assert relative(out, expected) < 1e-5
    with swap(tiny.pipe, text):
        assert relative(tiny(5), expected) > 1e-4  # the first answer matters


@pytest.mark.parametrize("name", OPENS_BY_ITSELF)
def test_pipelines_that_scale_their_input_need_no_swap(name: str, build: Callable[[str], Any]) -> None:
    tiny = build(name)
    with swap(tiny.pipe, "dpmpp:afs=zero_x0"):
        inside = tiny(4)
    assert torch.equal(_swapped(tiny, "dpmpp:afs=zero_x0")(4), inside)


def test_pipelines_that_do_not_are_told_to(build: Callable[[str], Any]) -> None:
    tiny = _swapped(build("ddpm"), "dpmpp:afs=zero_x0")
    with tiny.counting() as batches, pytest.raises(RuntimeError, match=r"samplers\.schedulers\.swap"):
        tiny(4)
    assert len(batches) == 1
    for name in ("sd3", "flux"):
        with pytest.raises(ValueError, match=r"samplers\.schedulers\.swap"):
            _swapped(build(name), "euler:afs=zero_x0")


def test_without_guidance_too(build: Callable[[str], Any]) -> None:
    tiny = build("sd")
    with swap(tiny.pipe, "dpmpp:afs=zero_x0"), tiny.counting() as batches:
        out = tiny(4, guidance_scale=1.0)
    assert batches == [2] * 4
    assert out.isfinite().all()


# ---- latents edited between steps ------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 2, 4])
def test_a_callbacks_latents_are_honoured(at: int, build: Callable[[str], Any]) -> None:
    def edit(pipe: Any, i: int, t: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": 0.5 * values["latents"] - 1.0} if i == at else {}

    tiny = build("sd")
    expected = _in_tree(tiny)(6, callback_on_step_end=edit)
    _swapped(tiny, "dpmpp:order=2")
    assert relative(tiny(6, callback_on_step_end=edit), expected) < 1e-4
    assert relative(tiny(6), expected) > 1e-2


def test_a_callback_may_stop_the_run(build: Callable[[str], Any]) -> None:
    def stop(pipe: Any, i: int, t: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
        pipe._interrupt = i == 1
        return {}

    tiny = _swapped(build("sd"), "unipc:order=3")
    whole = tiny(5)
    with tiny.counting() as batches:
        tiny(5, callback_on_step_end=stop)
    assert len(batches) == 2
    assert torch.equal(tiny(5), whole)  # the next run starts afresh


COPIES: list[Callable[[SolverScheduler], SolverScheduler]] = [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))]


@pytest.mark.parametrize("duplicate", COPIES, ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("text", ["unipc:order=3", "euler_ancestral", "dpmpp:afs=zero_x0"])
@pytest.mark.parametrize("name", ["sd", "wan22"])
def test_a_callback_may_put_a_copy_in_the_schedulers_place(
    name: str, text: str, duplicate: Callable[[SolverScheduler], SolverScheduler], build: Callable[..., Any]
) -> None:
    """In every step: what a run remembers travels with the scheduler."""

    def exchange(pipe: Any, i: int, t: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
        pipe.scheduler = duplicate(pipe.scheduler)
        return {}

    tiny = build(name)
    with swap(tiny.pipe, text, noise_seed=5) as scheduler:
        expected = tiny(5)
        assert torch.equal(tiny(5, callback_on_step_end=exchange), expected)
        assert tiny.pipe.scheduler is not scheduler
        assert torch.equal(tiny(5), expected)


# ---- generators ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_a_list_of_generators(name: str, build: Callable[[str], Any]) -> None:
    """One image per generator, whatever else is in the batch."""
    tiny = _swapped(build(name), "unipc:order=3")
    seeds = [3, 11]
    both = tiny(4, generator=[torch.Generator().manual_seed(seed) for seed in seeds])
    conditions = {key: value for key, value in tiny.inputs.items() if isinstance(value, Tensor)}
    for i, seed in enumerate(seeds):
        one = {key: value[i : i + 1] for key, value in conditions.items()}
        alone = tiny(4, generator=[torch.Generator().manual_seed(seed)], **one)
        torch.testing.assert_close(alone[0], both[i], rtol=1e-4, atol=1e-5)


# ---- half precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["sd", "sd3", "flux"])
def test_half_precision_pipelines(name: str, dtype: torch.dtype, build: Callable[[str], Any]) -> None:
    tiny = _swapped(build(name), "dpmpp:order=2")
    expected = tiny(5)
    tiny.pipe.to(dtype)
    tiny.inputs = {key: value.to(dtype) if isinstance(value, Tensor) else value for key, value in tiny.inputs.items()}
    latents = torch.randn(expected.shape)  # drawn once: half-precision noise is not the rounded float noise
    half = tiny(5, latents=latents.to(dtype))
    tiny.pipe.to(torch.float32)
    tiny.inputs = {key: value.float() if isinstance(value, Tensor) else value for key, value in tiny.inputs.items()}
    full = tiny(5, latents=latents.to(dtype).float())
    assert half.dtype == dtype
    assert relative(half, full) < 20 * torch.finfo(dtype).eps

"""Pipelines that enter a schedule in the middle, leave it early, bring their own times, or noise clean latents."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
)
from tiny_pipelines.harness import relative
from torch import Tensor

from samplers.schedulers import SolverScheduler, swap

STEPS = 10
LIMIT = 1e-4


def _variant(tiny: Any, cls: type, parts: dict[str, Any] | None = None, **inputs: Any) -> Any:
    """``tiny`` with its components, and further ``parts``, in another pipeline class."""
    optional = {"safety_checker": None, "feature_extractor": None, "image_encoder": None, **(parts or {})}
    wanted = inspect.signature(cls.__init__).parameters
    components = {key: value for key, value in {**optional, **tiny.pipe.components}.items() if key in wanted}
    more = {"requires_safety_checker": False} if "requires_safety_checker" in wanted else {}
    tiny.pipe = cls(**components, **more)
    tiny.pipe.set_progress_bar_config(disable=True)
    tiny.inputs |= inputs
    return tiny


def _sd_img2img(build: Callable[[str], Any]) -> Any:
    tiny = build("sd")
    del tiny.inputs["height"], tiny.inputs["width"]
    return _variant(tiny, StableDiffusionImg2ImgPipeline, image=torch.randn(2, 4, 8, 8))


def _noisy_half() -> dict[str, Tensor]:
    mask = torch.zeros(2, 1, 8, 8)
    mask[..., 4:] = 1
    return {"image": torch.randn(2, 4, 8, 8).clamp(-1, 1), "mask_image": mask}


def _sd_inpaint(build: Callable[[str], Any]) -> Any:
    return _variant(build("sd"), StableDiffusionInpaintPipeline, **_noisy_half())


def _sdxl_inpaint(build: Callable[[str], Any]) -> Any:
    return _variant(build("sdxl"), StableDiffusionXLInpaintPipeline, **_noisy_half())


def _sdxl_img2img(build: Callable[[str], Any]) -> Any:
    tiny = build("sdxl")
    del tiny.inputs["height"], tiny.inputs["width"]
    return _variant(tiny, StableDiffusionXLImg2ImgPipeline, image=torch.randn(2, 4, 8, 8))


def _sd_controlnet(build: Callable[[str], Any]) -> Any:
    tiny = build("sd")
    net = ControlNetModel.from_unet(tiny.pipe.unet, conditioning_embedding_out_channels=(8,))
    images = {"image": torch.randn(2, 4, 8, 8), "control_image": torch.rand(2, 3, 8, 8)}
    return _variant(tiny, StableDiffusionControlNetImg2ImgPipeline, {"controlnet": net.eval()}, **images)


def _sd3_img2img(build: Callable[[str], Any]) -> Any:
    return _variant(build("sd3"), StableDiffusion3Img2ImgPipeline, image=torch.randn(2, 8, 8, 8))


def _flux_img2img(build: Callable[[str], Any]) -> Any:
    return _variant(build("flux"), FluxImg2ImgPipeline, image=torch.rand(2, 3, 16, 16))


DPMPP = DPMSolverMultistepScheduler
FLOW_EULER = FlowMatchEulerDiscreteScheduler
IMG2IMG = [
    (_sd_img2img, DPMPP, {"solver_order": 1}, "dpmpp:order=1"),
    (_sd_img2img, DPMPP, {"solver_order": 2}, "dpmpp:order=2"),
    (_sd_inpaint, DPMPP, {"solver_order": 2}, "dpmpp:order=2"),
    (_sdxl_img2img, DPMPP, {"solver_order": 2}, "dpmpp:order=2"),
    (_sdxl_inpaint, DPMPP, {"solver_order": 1}, "dpmpp:order=1"),
    (_sdxl_inpaint, DPMPP, {"solver_order": 2}, "dpmpp:order=2"),
    (_sd_controlnet, DPMPP, {"solver_order": 2}, "dpmpp:order=2"),
    (_sd3_img2img, FLOW_EULER, {}, "euler"),
    (_flux_img2img, FLOW_EULER, {}, "euler"),
]


@pytest.mark.parametrize("strength", [0.3, 0.6, 1.0])
@pytest.mark.parametrize(("make", "cls", "options", "text"), IMG2IMG)
def test_entry_in_the_middle_equals_in_tree(
    make: Callable[..., Any],
    cls: type,
    options: dict[str, Any],
    text: str,
    strength: float,
    build: Callable[[str], Any],
) -> None:
    """The first step from there has no history in either; an inpainting pipeline noises the image anew after every step."""
    tiny = make(build)
    tiny.pipe.scheduler = cls.from_config(tiny.pipe.scheduler.config, **options)
    with tiny.counting() as theirs:
        expected = tiny(STEPS, strength=strength)
    with swap(tiny.pipe, text), tiny.counting() as ours:
        out = tiny(STEPS, strength=strength)
    assert ours == theirs == [tiny.rows] * round(STEPS * strength)
    assert relative(out, expected) < LIMIT


@pytest.mark.parametrize(("make", "kept"), [(_sd_img2img, 4), (_flux_img2img, 5)])
def test_a_noisy_image_is_not_taken_for_noise(make: Callable[..., Any], kept: int, build: Callable[[str], Any]) -> None:
    """Behind the first step, a schedule with an analytic one is the schedule of one evaluation more."""
    tiny = make(build)
    with swap(tiny.pipe, "dpmpp:grid=trailing"), tiny.counting() as batches:
        expected = tiny(STEPS, strength=kept / STEPS)
    assert len(batches) == kept
    with swap(tiny.pipe, "dpmpp:grid=trailing,afs=zero_x0"), tiny.counting() as batches:
        out = tiny(STEPS - 1, strength=0.5)
    assert len(batches) == kept
    assert torch.equal(out, expected)


@pytest.mark.parametrize("text", ["unipc:order=3", "deis:order=3", "dpmpp_2s", "ddim:afs=zero_x0"])
@pytest.mark.parametrize("make", [_sd_img2img, _flux_img2img])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_entry_with_any_recipe(make: Callable[..., Any], text: str, strength: float, build: Callable[[str], Any]) -> None:
    tiny = make(build)
    with swap(tiny.pipe, text), tiny.counting() as batches:
        out = tiny(STEPS, strength=strength)
    assert len(batches) == round(STEPS * strength)
    assert out.isfinite().all()


def test_a_run_that_stops_early_equals_in_tree(build: Callable[[str], Any]) -> None:
    """SDXL's ``denoising_end`` compares values of ``timesteps`` with training steps."""
    tiny = build("sdxl")
    tiny.pipe.scheduler = DPMPP.from_config(tiny.pipe.scheduler.config, solver_order=2)
    expected = tiny(STEPS, denoising_end=0.6)
    tiny.pipe.scheduler = SolverScheduler.from_config(tiny.pipe.scheduler.config, schedule="dpmpp:order=2")
    with tiny.counting() as batches:
        out = tiny(STEPS, denoising_end=0.6)
    assert 0 < len(batches) < STEPS
    assert relative(out, expected) < LIMIT


def test_a_pipelines_own_timesteps(build: Callable[[str], Any]) -> None:
    tiny = build("sdxl")
    tiny.pipe.scheduler = DPMPP.from_config(tiny.pipe.scheduler.config, solver_order=2)
    given = [900, 600, 300, 100]
    expected = tiny(None, timesteps=given)
    with swap(tiny.pipe, "dpmpp:order=2"), tiny.counting() as batches:
        out = tiny(None, timesteps=given)
    assert len(batches) == 4
    assert relative(out, expected) < LIMIT


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_pipelines_own_sigmas(name: str, build: Callable[[str], Any]) -> None:
    tiny = build(name)
    given = [1.0, 0.8, 0.5, 0.1]
    expected = tiny(4, sigmas=given)
    with swap(tiny.pipe, "euler"):
        assert relative(tiny(4, sigmas=given), expected) < LIMIT

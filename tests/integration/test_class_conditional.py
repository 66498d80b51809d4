"""The reference pipelines' own pipeline class, with a tiny random network in it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel
from PIL import Image
from torch import Tensor

from samplers.reference.pipeline import ClassConditionalPipeline
from samplers.schedulers import SolverScheduler, swap

NULL = 3


@pytest.fixture
def pipe() -> ClassConditionalPipeline:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
        num_class_embeds=NULL + 1,
    )
    made = ClassConditionalPipeline(unet=unet.eval(), scheduler=DDPMScheduler(clip_sample=False))
    made.set_progress_bar_config(disable=True)
    return made


@contextmanager
def counting(pipe: ClassConditionalPipeline) -> Iterator[list[list[int]]]:
    """The classes of every network call made inside."""
    calls: list[list[int]] = []

    def before(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        calls.append(kwargs["class_labels"].tolist())

    hook = pipe.unet.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


def _draw(pipe: ClassConditionalPipeline, labels: Any, w: float = 2.0, steps: int = 5, **extra: Any) -> Tensor:
    generator = extra.pop("generator", None) or torch.Generator().manual_seed(5)
    return pipe(
        labels, guidance_scale=w, num_inference_steps=steps, generator=generator, output_type="pt", return_dict=False, **extra
    )[0]


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_guidance_is_one_doubled_batch(pipe: ClassConditionalPipeline) -> None:
    with swap(pipe, "dpmpp:order=2"), counting(pipe) as calls:
        _draw(pipe, [0, 2])
        _draw(pipe, [0, 2], w=1.0)
    assert calls == [[NULL, NULL, 0, 2]] * 5 + [[0, 2]] * 5


def test_guidance_of_no_class_changes_nothing(pipe: ClassConditionalPipeline) -> None:
    with swap(pipe, "unipc:order=3"):
        plain, guided, other = _draw(pipe, NULL, w=1.0), _draw(pipe, NULL, w=4.0), _draw(pipe, 0, w=4.0)
    torch.testing.assert_close(guided, plain, rtol=1e-4, atol=1e-5)
    assert relative(other, plain) > 1e-3


@pytest.mark.parametrize("w", [1.0, 3.0])
def test_first_order_equals_in_tree(w: float, pipe: ClassConditionalPipeline) -> None:
    pipe.scheduler = DPMSolverMultistepScheduler(solver_order=1)
    expected = _draw(pipe, [0, 1, 2], w)
    with swap(pipe, "dpmpp:order=1"):
        assert relative(_draw(pipe, [0, 1, 2], w), expected) < 1e-4
    with swap(pipe, "dpmpp:order=2"):
        assert relative(_draw(pipe, [0, 1, 2], w), expected) > 1e-3


def test_stochastic_schedulers_draw_from_the_generator(pipe: ClassConditionalPipeline) -> None:
    """The training scheduler adds noise in every step."""
    first, again = _draw(pipe, [0, 1]), _draw(pipe, [0, 1])
    assert torch.equal(first, again)
    other = _draw(pipe, [0, 1], latents=torch.randn(2, 1, 8, 8), generator=torch.Generator().manual_seed(6))
    assert not torch.equal(first, other)


@pytest.mark.parametrize("w", [1.0, 3.0])
def test_an_analytic_first_step_by_itself_and_through_swap(w: float, pipe: ClassConditionalPipeline) -> None:
    with swap(pipe, "dpmpp:afs=zero_x0"), counting(pipe) as calls:
        inside = _draw(pipe, [0, 1], w)
    assert len(calls) == 5
    pipe.scheduler = SolverScheduler.from_config(pipe.scheduler.config, schedule="dpmpp:afs=zero_x0")
    assert torch.equal(_draw(pipe, [0, 1], w), inside)


def test_images_by_their_generators(pipe: ClassConditionalPipeline) -> None:
    def generators(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    with swap(pipe, "unipc:order=3"):
        both = _draw(pipe, [0, 2], generator=generators(1, 2))
        alone = _draw(pipe, [2], generator=generators(2))
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-5)


def test_saved_and_reloaded(pipe: ClassConditionalPipeline, tmp_path: Path) -> None:
    pipe.scheduler = SolverScheduler.from_config(pipe.scheduler.config, schedule="unipc:order=3")
    expected = _draw(pipe, [0, 1])
    pipe.save_pretrained(tmp_path)
    again = ClassConditionalPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(_draw(again, [0, 1]), expected)


def test_kinds_of_output(pipe: ClassConditionalPipeline) -> None:
    start = torch.randn(1, 1, 8, 8)
    kinds: dict[str, Callable[[Any], np.ndarray]] = {
        "pt": lambda out: out[0, 0].numpy(),
        "np": lambda out: out[0, :, :, 0],
        "pil": lambda out: np.asarray(out[0], dtype=np.float32) / 255,
    }
    images = {}
    for kind, read in kinds.items():
        out = pipe(1, num_inference_steps=3, latents=start, output_type=kind, generator=torch.Generator().manual_seed(0)).images
        images[kind] = read(out)
        assert kind != "pil" or isinstance(out[0], Image.Image)
    np.testing.assert_array_equal(images["pt"], images["np"])
    np.testing.assert_allclose(images["pil"], images["np"], atol=0.51 / 255)


def test_bad_input_is_refused_before_the_network(pipe: ClassConditionalPipeline) -> None:
    with counting(pipe) as calls:
        with pytest.raises(ValueError, match=rf"class_labels \[7\] are outside 0\.\.{NULL}"):
            pipe([0, 7])
        with pytest.raises(ValueError, match="unknown output_type 'latent'; known: pil, np, pt"):
            pipe(0, output_type="latent")
        with pytest.raises(ValueError, match=r"latents have shape \(2, 1, 8, 8\); these labels need \(1, 1, 8, 8\)"):
            pipe(0, latents=torch.zeros(2, 1, 8, 8))
    assert calls == []

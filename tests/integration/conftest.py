"""Tiny pipelines with random weights, one of each kind that calls its scheduler differently. Nothing is downloaded."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.utils import logging
from torch import Tensor

BATCH = 2
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@dataclass
class Tiny:
    """A pipeline with what is needed to call, count, save and reload it."""

    pipe: DiffusionPipeline
    inputs: dict[str, Any]  # of a call, besides the number of steps and the generator
    rows: int = 2 * BATCH  # of one network call for `BATCH` images: guidance doubles them
    absent: tuple[str, ...] = ()  # components that must be passed to ``from_pretrained`` as None

    def __post_init__(self) -> None:
        self.pipe.set_progress_bar_config(disable=True)
        self.denoiser.eval()  # DiT drops labels at random in training

    @property
    def denoiser(self) -> torch.nn.Module:
        return getattr(self.pipe, "unet", None) or self.pipe.transformer

    def __call__(self, steps: int, seed: int = 7, **extra: Any) -> Tensor:
        """Latents, or images where the pipeline has no other output; (B, *E) float."""
        inputs = {"generator": torch.Generator().manual_seed(seed), **self.inputs, **extra}
        out = self.pipe(num_inference_steps=steps, **inputs).images
        return torch.as_tensor(out)

    @contextmanager
    def hooked(self, after: Callable[..., Any]) -> Iterator[None]:
        """``after(module, args, kwargs, output)`` follows every network call inside."""
        hook = self.denoiser.register_forward_hook(after, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    @contextmanager
    def counting(self) -> Iterator[list[int]]:
        """The batch of every network call made inside."""
        batches: list[int] = []
        with self.hooked(lambda module, args, kwargs, output: batches.append(len(_answer(output)))):
            yield batches

    @contextmanager
    def failing_at(self, call: int) -> Iterator[None]:
        """The network raises at that call, counted from 0."""
        made: list[int] = []

        def after(module: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            made.append(len(made))
            if made[-1] == call:
                raise RuntimeError("on purpose")

        with self.hooked(after):
            yield

    @contextmanager
    def first_answer_is_the_input(self) -> Iterator[None]:
        """The first network call inside returns its input: a state of pure noise, in words of eps or of velocity."""
        pending = [True]

        def after(module: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            if not pending:
                return None
            pending.clear()
            given, answer = args[0] if args else kwargs["hidden_states"], _answer(output)
            noise = torch.cat([given] * (answer.shape[1] // given.shape[1]), dim=1)  # learned variances: any
            return (noise,) if isinstance(output, tuple) else type(output)(sample=noise)

        with self.hooked(after):
            yield


def _answer(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output.sample


def _unet(**options: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
        **options,
    )


def _vae(channels: int = 4) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8,),
        latent_channels=channels,
        shift_factor=0.0,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
    )


def _embeddings(pooled: bool, guided: bool = True) -> dict[str, Tensor]:
    out = {"prompt_embeds": torch.randn(BATCH, 5, 16)}
    if pooled:
        out["pooled_prompt_embeds"] = torch.randn(BATCH, 16)
    if guided:
        out |= {f"negative_{name}": torch.randn_like(value) for name, value in out.items()}
    return out


def _text(*names: str) -> dict[str, None]:
    return dict.fromkeys(f"{kind}{name}" for kind in ("text_encoder", "tokenizer") for name in names)


def _sd() -> Tiny:
    none = _text("")
    pipe = StableDiffusionPipeline(
        vae=_vae(),
        unet=_unet(),
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1, **BETAS),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **none,
    )
    return Tiny(pipe, {**_embeddings(False), "height": 8, "width": 8, "output_type": "latent"}, absent=tuple(none))


def _sdxl() -> Tiny:
    none = _text("", "_2")
    time = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    pipe = StableDiffusionXLPipeline(
        vae=_vae(),
        unet=_unet(**time, projection_class_embeddings_input_dim=6 * 8 + 16),
        scheduler=EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1, **BETAS),
        **none,
    )
    return Tiny(pipe, {**_embeddings(True), "height": 8, "width": 8, "output_type": "latent"}, absent=tuple(none))


def _sd3() -> Tiny:
    none = _text("", "_2", "_3")
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=8,
        out_channels=8,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = StableDiffusion3Pipeline(vae=_vae(8), transformer=transformer, scheduler=scheduler, **none)
    return Tiny(pipe, {**_embeddings(True), "height": 8, "width": 8, "output_type": "latent"}, absent=tuple(none))


def _flux() -> Tiny:
    none = _text("", "_2")
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    pipe = FluxPipeline(vae=_vae(1), transformer=transformer, scheduler=scheduler, **none)
    inputs = {**_embeddings(True, guided=False), "height": 16, "width": 16, "output_type": "latent"}
    return Tiny(pipe, inputs, rows=BATCH, absent=tuple(none))


def _dit() -> Tiny:
    transformer = DiTTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=8, num_layers=1, num_attention_heads=2, attention_head_dim=8
    )
    pipe = DiTPipeline(transformer=transformer, vae=_vae(), scheduler=DDIMScheduler(clip_sample=False))
    return Tiny(pipe, {"class_labels": [1, 7], "output_type": "np"})


def _ddpm() -> Tiny:
    unet = UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
    )
    return Tiny(DDPMPipeline(unet=unet, scheduler=DDPMScheduler()), {"batch_size": BATCH, "output_type": "np"}, rows=BATCH)


@pytest.fixture
def build() -> Callable[[str], Tiny]:
    """``build("sd")``: the same weights and inputs every time."""
    makers = {"sd": _sd, "sdxl": _sdxl, "sd3": _sd3, "flux": _flux, "dit": _dit, "ddpm": _ddpm}

    def make(name: str) -> Tiny:
        torch.manual_seed(0)
        return makers[name]()

    return make


@pytest.fixture(autouse=True)
def quiet() -> None:
    """Pipelines log that absent text encoders are not saved."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()

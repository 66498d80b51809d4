"""Image pipelines, one of each kind that calls its scheduler differently."""

from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    KandinskyV22Pipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)

from .harness import BATCH, HEADS, LATENT, NO_TEXT, Tiny, embeddings

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DPM_FIRST = ("dpmpp:order=1", DPMSolverMultistepScheduler, {"solver_order": 1})
DDIM_FIRST = ("ddim", DDIMScheduler, {})
FLOW_FIRST = [(text, FlowMatchEulerDiscreteScheduler, {}) for text in ("euler", "ddim", "dpmpp:order=1")]


def text_unet(**options: Any) -> UNet2DConditionModel:
    """A conditional UNet of 8 x 8 latents."""
    return UNet2DConditionModel(
        **{
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "layers_per_block": 1,
            "block_out_channels": (8, 16),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 16,
            "attention_head_dim": 4,
            "norm_num_groups": 4,
            **options,
        }
    )


def kl_vae(channels: int = 4, **options: Any) -> AutoencoderKL:
    """An autoencoder that keeps the resolution."""
    return AutoencoderKL(
        block_out_channels=(8,),
        latent_channels=channels,
        shift_factor=0.0,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        **options,
    )


def no_text(*names: str) -> dict[str, None]:
    """Absent text encoders and tokenizers with these suffixes."""
    return dict.fromkeys(f"{kind}{name}" for kind in ("text_encoder", "tokenizer") for name in names)


def sd() -> Tiny:
    """Stable Diffusion 1.5."""
    none = no_text("")
    pipe = StableDiffusionPipeline(
        vae=kl_vae(),
        unet=text_unet(),
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1, **BETAS),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **none,
    )
    inputs = {**embeddings(), **LATENT, "height": 8, "width": 8}
    return Tiny(pipe, inputs, absent=tuple(none), first_order=[DPM_FIRST, DDIM_FIRST])


def sdxl() -> Tiny:
    """Stable Diffusion XL."""
    none = no_text("", "_2")
    time = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    pipe = StableDiffusionXLPipeline(
        vae=kl_vae(),
        unet=text_unet(**time, projection_class_embeddings_input_dim=6 * 8 + 16),
        scheduler=EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1, **BETAS),
        **none,
    )
    inputs = {**embeddings(pooled=True), **LATENT, "height": 8, "width": 8}
    return Tiny(pipe, inputs, absent=tuple(none), first_order=[DPM_FIRST])


def sd3() -> Tiny:
    """Stable Diffusion 3: static shift."""
    none = no_text("", "_2", "_3")
    transformer = SD3Transformer2DModel(
        **HEADS,
        sample_size=8,
        patch_size=1,
        in_channels=8,
        out_channels=8,
        attention_head_dim=8,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = StableDiffusion3Pipeline(vae=kl_vae(8), transformer=transformer, scheduler=scheduler, **none)
    inputs = {**embeddings(pooled=True), **LATENT, "height": 8, "width": 8}
    return Tiny(pipe, inputs, absent=tuple(none), first_order=FLOW_FIRST)


def flux() -> Tiny:
    """Flux: dynamic shift, no second side of guidance."""
    none = no_text("", "_2")
    transformer = FluxTransformer2DModel(
        **HEADS,
        patch_size=1,
        in_channels=4,
        num_single_layers=1,
        attention_head_dim=16,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    pipe = FluxPipeline(vae=kl_vae(1), transformer=transformer, scheduler=scheduler, **none)
    inputs = {**embeddings(pooled=True, guided=False), **LATENT, "height": 16, "width": 16}
    return Tiny(pipe, inputs, rows=BATCH, absent=tuple(none), first_order=FLOW_FIRST)


def dit() -> Tiny:
    """Class-conditional; learned variances, and a doubled state."""
    transformer = DiTTransformer2DModel(
        **HEADS, sample_size=8, patch_size=2, in_channels=4, out_channels=8, attention_head_dim=8
    )
    pipe = DiTPipeline(transformer=transformer, vae=kl_vae(), scheduler=DDIMScheduler(clip_sample=False))
    return Tiny(pipe, {"class_labels": [1, 7], "output_type": "np"}, first_order=[DPM_FIRST, DDIM_FIRST])


def _pixel_unet() -> UNet2DModel:
    return UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
    )


def ddpm() -> Tiny:
    """Unconditional, in pixels."""
    pipe = DDPMPipeline(unet=_pixel_unet(), scheduler=DDPMScheduler())
    return Tiny(pipe, {"batch_size": BATCH, "output_type": "np"}, rows=BATCH, first_order=[DPM_FIRST, DDIM_FIRST])


def ddim() -> Tiny:
    """The same with the arguments of DDIM."""
    pipe = DDIMPipeline(unet=_pixel_unet(), scheduler=DDIMScheduler())
    return Tiny(pipe, {"batch_size": BATCH, "output_type": "np"}, rows=BATCH, first_order=[DDIM_FIRST])


def pixart_sigma() -> Tiny:
    """PixArt-sigma: a DPM-Solver checkpoint with learned variances."""
    transformer = PixArtTransformer2DModel(
        **HEADS,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
        use_additional_conditions=False,
    )
    pipe = PixArtSigmaPipeline(vae=kl_vae(), transformer=transformer, scheduler=DPMSolverMultistepScheduler(), **NO_TEXT)
    sizes = {"height": 8, "width": 8, "use_resolution_binning": False}
    inputs = {**embeddings(masks=True), **LATENT, **sizes, "negative_prompt": None}
    return Tiny(pipe, inputs, absent=tuple(NO_TEXT), first_order=[DPM_FIRST])


FLOW_DPM = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


def sana() -> Tiny:
    """Sana: flow matching in DPM-Solver's class."""
    transformer = SanaTransformer2DModel(
        **HEADS,
        in_channels=4,
        out_channels=4,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=16,
        sample_size=32,
    )
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        encoder_layers_per_block=(1,),
        decoder_layers_per_block=(1,),
        encoder_qkv_multiscales=((),),
        decoder_qkv_multiscales=((),),
    )
    pipe = SanaPipeline(vae=vae, transformer=transformer, scheduler=DPMSolverMultistepScheduler(**FLOW_DPM), **NO_TEXT)
    inputs = {**embeddings(masks=True), **LATENT, "negative_prompt": None, "height": 32, "width": 32}
    inputs["use_resolution_binning"] = False
    sigmas = torch.linspace(0.999, 0, 9)[:-1].tolist()  # DPM-Solver's; unshifted
    return Tiny(pipe, inputs, absent=tuple(NO_TEXT), first_order=[DPM_FIRST], sigmas=sigmas, whole_steps=True)


def kandinsky() -> Tiny:
    """Kandinsky 2.2: an ancestral scheduler with learned variances, on image embeddings; never scales its input."""
    unet = text_unet(
        out_channels=8,
        cross_attention_dim=8,
        encoder_hid_dim=16,
        encoder_hid_dim_type="image_proj",
        addition_embed_type="image",
        addition_embed_type_num_heads=4,
        down_block_types=("DownBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "UpBlock2D"),
    )
    movq = VQModel(
        block_out_channels=(8,),
        latent_channels=4,
        num_vq_embeddings=12,
        vq_embed_dim=4,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
    )
    ddpm = {"clip_sample": False, "prediction_type": "epsilon"}
    pipe = KandinskyV22Pipeline(unet=unet, scheduler=DDPMScheduler(**BETAS, **ddpm), movq=movq)
    names = ("image_embeds", "negative_image_embeds")
    inputs = {**{name: torch.randn(BATCH, 16) for name in names}, **LATENT, "height": 8, "width": 8}
    return Tiny(pipe, inputs, first_order=[DPM_FIRST, DDIM_FIRST, ("ddpm", DDPMScheduler, {})])

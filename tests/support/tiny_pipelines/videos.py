"""Video pipelines: separate calls for the sides of guidance, two experts, images beside or inside the state."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVideoToVideoPipeline,
)

from .harness import BATCH, HEADS, LATENT, NO_TEXT, Tiny, embeddings
from .images import FLOW_DPM

FLOW_FIRST = [(text, FlowMatchEulerDiscreteScheduler, {}) for text in ("euler", "ddim")]
SIZES = {"height": 16, "width": 16}


def _wan_transformer(in_channels: int = 16) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        **HEADS,
        attention_head_dim=12,
        in_channels=in_channels,
        out_channels=16,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        rope_max_seq_len=32,
    )


def _wan_parts(in_channels: int = 16) -> dict[str, Any]:
    vae = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    return {"vae": vae, "transformer": _wan_transformer(in_channels), **NO_TEXT}


def _wan_tiny(pipe: Any, **inputs: Any) -> Tiny:
    return Tiny(pipe, {**embeddings(), **LATENT, **SIZES, **inputs}, calls=2, rows=BATCH, first_order=FLOW_FIRST)


def wan() -> Tiny:
    """Wan 2.1 text-to-video."""
    return _wan_tiny(WanPipeline(scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0), **_wan_parts()), num_frames=5)


def wan_unipc() -> Tiny:
    """With the scheduler of the published checkpoints."""
    tiny = wan()
    tiny.pipe.scheduler = UniPCMultistepScheduler(**FLOW_DPM)
    predictor = {"solver_order": 1, "disable_corrector": list(range(8))}
    tiny.first_order = [(text, UniPCMultistepScheduler, predictor) for text in ("euler", "ddim")]
    tiny.whole_steps = True
    return tiny


def wan22(boundary: float = 0.875) -> Tiny:
    """Wan 2.2: one expert at and above the boundary, the other below."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    pipe = WanPipeline(scheduler=scheduler, **_wan_parts(), transformer_2=_wan_transformer(), boundary_ratio=boundary)
    return _wan_tiny(pipe, num_frames=5)


def wan_v2v() -> Tiny:
    """Wan video-to-video: never says where in the schedule it begins."""
    pipe = WanVideoToVideoPipeline(scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0), **_wan_parts())
    return _wan_tiny(pipe, video=torch.rand(BATCH, 5, 3, 16, 16), strength=1.0)


def wan_i2v() -> Tiny:
    """Wan image-to-video: the image is further channels of the network's input."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    pipe = WanImageToVideoPipeline(
        scheduler=scheduler, **_wan_parts(36), image_encoder=None, image_processor=None, boundary_ratio=0.0
    )
    return _wan_tiny(pipe, num_frames=5, image=torch.rand(1, 3, 16, 16))


def wan_ti2v() -> Tiny:
    """Wan 2.2 5B image-to-video: the image is the clean first frame of the network's input, at time 0."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    pipe = WanImageToVideoPipeline(
        scheduler=scheduler, **_wan_parts(), image_encoder=None, image_processor=None, boundary_ratio=0.0, expand_timesteps=True
    )
    return _wan_tiny(pipe, num_frames=5, image=torch.rand(1, 3, 16, 16))


def _ltx_parts() -> dict[str, Any]:
    transformer = LTXVideoTransformer3DModel(
        **HEADS, in_channels=8, out_channels=8, attention_head_dim=8, cross_attention_dim=16, caption_channels=16
    )
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1)
    return {"vae": vae, "transformer": transformer, "scheduler": scheduler, **NO_TEXT}


def ltx() -> Tiny:
    """LTX-Video: dynamic shift that stretches to a terminal value."""
    inputs = {**embeddings(masks=True), **LATENT, "height": 32, "width": 32, "num_frames": 9}
    return Tiny(LTXPipeline(**_ltx_parts()), inputs, first_order=FLOW_FIRST)


def ltx_i2v() -> Tiny:
    """LTX image-to-video: the image is the clean first frame of the network's input, at time 0."""
    inputs = {**embeddings(masks=True), **LATENT, "height": 32, "width": 32, "num_frames": 9}
    inputs["image"] = torch.rand(BATCH, 3, 32, 32)
    return Tiny(LTXImageToVideoPipeline(**_ltx_parts()), inputs, first_order=FLOW_FIRST)


def mochi() -> Tiny:
    """Mochi: the network is told 1 - sigma, and predicts the reversed velocity."""
    transformer = MochiTransformer3DModel(
        **HEADS,
        patch_size=2,
        attention_head_dim=8,
        pooled_projection_dim=16,
        in_channels=12,
        text_embed_dim=16,
        time_embed_dim=4,
        activation_fn="swiglu",
        max_sequence_length=5,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    none = {"vae": None, **NO_TEXT}
    pipe = MochiPipeline(transformer=transformer, scheduler=scheduler, **none)
    inputs = {**embeddings(masks=True), **LATENT, **SIZES, "num_frames": 7}
    return Tiny(pipe, inputs, absent=tuple(none), first_order=FLOW_FIRST, answer_to_noise=-1.0)

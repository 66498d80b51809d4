"""Audio pipelines: EDM clocks, sequences, three text encoders."""

import warnings
from typing import Any

import torch
from diffusers import (
    AudioLDM2Pipeline,
    AudioLDM2ProjectionModel,
    AudioLDM2UNet2DConditionModel,
    AutoencoderOobleck,
    CosineDPMSolverMultistepScheduler,
    DanceDiffusionPipeline,
    DDIMScheduler,
    EDMDPMSolverMultistepScheduler,
    IPNDMScheduler,
    SchedulerMixin,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
    UNet1DModel,
)
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, SpeechT5HifiGan, SpeechT5HifiGanConfig, T5Config, T5EncoderModel

from .harness import BATCH, HEADS, LATENT, NO_TEXT, Tiny, embeddings
from .images import BETAS, DDIM_FIRST, DPM_FIRST, kl_vae

EDM = {"sigma_min": 0.3, "sigma_max": 500.0, "sigma_data": 1.0, "prediction_type": "v_prediction"}


def _stable_audio(scheduler: SchedulerMixin) -> Tiny:
    transformer = StableAudioDiTModel(
        **HEADS,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        attention_head_dim=8,
        num_key_value_attention_heads=1,
        cross_attention_dim=16,
        cross_attention_input_dim=16,
        time_proj_dim=16,
        global_states_input_dim=32,
    )
    sizes = {"encoder_hidden_size": 4, "decoder_channels": 4, "decoder_input_channels": 4}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*weight_norm` is deprecated", category=FutureWarning)
        vae = AutoencoderOobleck(downsampling_ratios=[1, 2], channel_multiples=[1, 2], **sizes)
    projection = StableAudioProjectionModel(text_encoder_dim=16, conditioning_dim=16, min_value=0, max_value=32)
    pipe = StableAudioPipeline(vae=vae, transformer=transformer, projection_model=projection, scheduler=scheduler, **NO_TEXT)
    return Tiny(pipe, {**embeddings(), **LATENT})


def stable_audio() -> Tiny:
    """Stable Audio in the EDM class, whose clock is log sigma / 4."""
    tiny = _stable_audio(EDMDPMSolverMultistepScheduler(sigma_schedule="exponential", **EDM))
    tiny.first_order = [("dpmpp:order=1", EDMDPMSolverMultistepScheduler, {"solver_order": 1})]
    return tiny


def stable_audio_cosine() -> Tiny:
    """With the class of the published checkpoint: a stochastic solver, and a clock that is arctan sigma."""
    tiny = _stable_audio(CosineDPMSolverMultistepScheduler(sigma_schedule="exponential", **EDM))
    tiny.first_order = [("dpmpp:order=1,tau=1", CosineDPMSolverMultistepScheduler, {"solver_order": 1})]
    return tiny


class GeneratorNoise:
    """In place of the Brownian tree of in-tree stochastic classes: the draws of the pipeline's generator, in order."""

    def __init__(self, x: Tensor, sigma_min: float, sigma_max: float, seed: int | None = None, **options: Any) -> None:
        assert seed is not None
        self.generator, self.shape = torch.Generator().manual_seed(seed), x.shape
        self(0, 0)  # the starting noise was drawn from the same generator

    def __call__(self, sigma: float, sigma_next: float) -> Tensor:
        return torch.randn(self.shape, generator=self.generator)


def audioldm2() -> Tiny:
    """AudioLDM 2: two cross-attention contexts; the vocoder's config sets the latents' height."""
    unet = AudioLDM2UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=((None, 8, 16), (None, 8, 16)),  # none: self-attention
    )
    upsampling: dict[str, Any] = {"upsample_rates": [2, 2], "upsample_kernel_sizes": [4, 4], "upsample_initial_channel": 8}
    pipe = AudioLDM2Pipeline(
        vae=kl_vae(),
        text_encoder=None,
        text_encoder_2=T5EncoderModel(T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=9)),
        projection_model=AudioLDM2ProjectionModel(text_encoder_dim=16, text_encoder_1_dim=8, langauge_model_dim=8),
        language_model=GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9, bos_token_id=0, eos_token_id=1)),
        tokenizer=None,
        tokenizer_2=None,
        feature_extractor=None,
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1, **BETAS),
        vocoder=SpeechT5HifiGan(SpeechT5HifiGanConfig(model_in_dim=8, **upsampling)),
    )
    mask = torch.ones(BATCH, 5, dtype=torch.long)
    generated = {f"{side}generated_prompt_embeds": torch.randn(BATCH, 3, 8) for side in ("", "negative_")}
    masks = {"attention_mask": mask, "negative_attention_mask": mask}
    inputs = {**embeddings(), **generated, **masks, **LATENT, "audio_length_in_s": 8 * 4 / 16000}
    return Tiny(pipe, inputs, first_order=[DPM_FIRST, DDIM_FIRST])


def dance() -> Tiny:
    """Dance Diffusion: raw waveforms, and a scheduler without betas or prediction type."""
    unet = UNet1DModel(
        block_out_channels=(32, 32, 32),
        extra_in_channels=16,
        sample_size=128,
        sample_rate=16000,
        in_channels=2,
        out_channels=2,
        flip_sin_to_cos=True,
        time_embedding_type="fourier",
        time_embedding_dim=16,
    )
    pipe = DanceDiffusionPipeline(unet=unet, scheduler=IPNDMScheduler())
    same = [("ipndm:afs=zero_x0", IPNDMScheduler, {})]
    return Tiny(pipe, {"batch_size": BATCH}, rows=BATCH, first_order=same, lost_answers=1)

"""The swap in further pipelines: unconditional, DPM-Solver flow, video with separate guidance calls, audio on EDM clocks."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    AutoencoderOobleck,
    DDIMPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
    UNet2DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    WanVideoToVideoPipeline,
)
from torch import Tensor

from samplers import NoiseSchedule, parse_recipe
from samplers.schedulers import swap

BATCH = 2
HEADS = {"num_layers": 1, "num_attention_heads": 2}
NO_TEXT = {"tokenizer": None, "text_encoder": None}
LATENT = {"output_type": "latent"}


@dataclass
class Tiny:
    """A pipeline and the inputs of a call."""

    pipe: DiffusionPipeline
    inputs: dict[str, Any]
    calls: int = 1  # network calls per step: Wan makes one for each side of guidance
    rows: int = 2 * BATCH  # of one network call
    first_order: list[tuple[str, type, dict[str, Any]]] = field(default_factory=list)  # ours, in-tree, its options
    sigmas: list[float] | None = None  # of 8 steps, passed to ours where the in-tree class places them differently
    whole_steps: bool = False  # the in-tree class cuts flow timesteps to integers: show the network such in both

    def __post_init__(self) -> None:
        self.pipe.set_progress_bar_config(disable=True)
        self.denoiser.eval()

    @property
    def denoiser(self) -> torch.nn.Module:
        return getattr(self.pipe, "unet", None) or self.pipe.transformer

    def __call__(self, steps: int, seed: int = 7, **extra: Any) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        out = self.pipe(num_inference_steps=steps, generator=generator, return_dict=False, **self.inputs, **extra)
        return torch.as_tensor(out[0])

    @contextmanager
    def cutting_timesteps(self) -> Iterator[None]:
        """The network inside sees whole training steps below 1000."""

        def before(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
            return args, {**kwargs, "timestep": kwargs["timestep"].float().floor().clamp(max=999.0)}

        hook = self.denoiser.register_forward_pre_hook(before, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    @contextmanager
    def counting(self) -> Iterator[list[int]]:
        """The batch of every network call made inside."""
        batches: list[int] = []

        def after(module: torch.nn.Module, args: tuple, output: Any) -> None:
            batches.append(len(output[0] if isinstance(output, tuple) else output.sample))

        hook = self.denoiser.register_forward_hook(after)
        try:
            yield batches
        finally:
            hook.remove()


def _text(masks: bool, dim: int = 16) -> dict[str, Tensor]:
    out = {"prompt_embeds": torch.randn(BATCH, 5, dim), "negative_prompt_embeds": torch.randn(BATCH, 5, dim)}
    if masks:
        out |= {
            name: torch.ones(BATCH, 5, dtype=torch.long) for name in ("prompt_attention_mask", "negative_prompt_attention_mask")
        }
    return out


def _ddim() -> Tiny:
    unet = UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
    )
    first = [("ddim", DDIMScheduler, {})]
    pipe = DDIMPipeline(unet=unet, scheduler=DDIMScheduler())
    return Tiny(pipe, {"batch_size": BATCH, "output_type": "np"}, rows=BATCH, first_order=first)


def _pixart() -> Tiny:
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
    vae = AutoencoderKL(
        block_out_channels=(8,),
        latent_channels=4,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
    )
    first = [("dpmpp:order=1", DPMSolverMultistepScheduler, {"solver_order": 1})]
    pipe = PixArtSigmaPipeline(vae=vae, transformer=transformer, scheduler=DPMSolverMultistepScheduler(), **NO_TEXT)
    inputs = {**_text(True), **LATENT, "negative_prompt": None, "height": 8, "width": 8, "use_resolution_binning": False}
    return Tiny(pipe, inputs, first_order=first)


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
FLOW_EULER = [("euler", FlowMatchEulerDiscreteScheduler, {}), ("ddim", FlowMatchEulerDiscreteScheduler, {})]


def _sana() -> Tiny:
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        **HEADS,
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
    first = [("dpmpp:order=1", DPMSolverMultistepScheduler, {"solver_order": 1})]
    pipe = SanaPipeline(vae=vae, transformer=transformer, scheduler=DPMSolverMultistepScheduler(**FLOW), **NO_TEXT)
    inputs = {**_text(True), **LATENT, "negative_prompt": None, "height": 32, "width": 32, "use_resolution_binning": False}
    sigmas = torch.linspace(0.999, 0, 9)[:-1].tolist()  # DPM-Solver's; unshifted
    return Tiny(pipe, inputs, first_order=first, sigmas=sigmas, whole_steps=True)


def _wan_parts() -> dict[str, Any]:
    transformer = WanTransformer3DModel(
        **HEADS,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        rope_max_seq_len=32,
    )
    vae = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    return {"vae": vae, "transformer": transformer, **NO_TEXT}


def _wan() -> Tiny:
    pipe = WanPipeline(scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0), **_wan_parts())
    inputs = {**_text(False), **LATENT, "height": 16, "width": 16, "num_frames": 5}
    return Tiny(pipe, inputs, calls=2, rows=BATCH, first_order=FLOW_EULER)


def _wan_unipc() -> Tiny:
    """With the scheduler of the published checkpoints."""
    tiny = _wan()
    tiny.pipe.scheduler = UniPCMultistepScheduler(**FLOW)
    predictor = {"solver_order": 1, "disable_corrector": list(range(8))}
    tiny.first_order = [(text, UniPCMultistepScheduler, predictor) for text in ("euler", "ddim")]
    tiny.whole_steps = True
    return tiny


def _wan_v2v() -> Tiny:
    pipe = WanVideoToVideoPipeline(scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0), **_wan_parts())
    inputs = {**_text(False), **LATENT, "video": torch.rand(BATCH, 5, 3, 16, 16), "height": 16, "width": 16, "strength": 1.0}
    return Tiny(pipe, inputs, calls=2, rows=BATCH, first_order=FLOW_EULER)


def _ltx() -> Tiny:
    transformer = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, **HEADS, attention_head_dim=8, cross_attention_dim=16, caption_channels=16
    )
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1)
    pipe = LTXPipeline(vae=vae, transformer=transformer, scheduler=scheduler, **NO_TEXT)
    return Tiny(pipe, {**_text(True), **LATENT, "height": 32, "width": 32, "num_frames": 9}, first_order=FLOW_EULER)


def _audio() -> Tiny:
    transformer = StableAudioDiTModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        attention_head_dim=8,
        **HEADS,
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
    edm = {"sigma_min": 0.3, "sigma_max": 500.0, "sigma_data": 1.0, "prediction_type": "v_prediction"}
    scheduler = EDMDPMSolverMultistepScheduler(sigma_schedule="exponential", **edm)
    pipe = StableAudioPipeline(vae=vae, transformer=transformer, projection_model=projection, scheduler=scheduler, **NO_TEXT)
    first = [("dpmpp:order=1", EDMDPMSolverMultistepScheduler, {"solver_order": 1})]
    return Tiny(pipe, {**_text(False), **LATENT}, first_order=first)


MAKERS = {
    "ddim": _ddim,
    "pixart_sigma": _pixart,
    "sana": _sana,
    "wan": _wan,
    "wan_unipc": _wan_unipc,
    "wan_v2v": _wan_v2v,
    "ltx": _ltx,
    "stable_audio": _audio,
}
every_pipeline = pytest.mark.parametrize("name", MAKERS)


@pytest.fixture
def make() -> Callable[[str], Tiny]:
    """``make("wan")``: the same weights and inputs every time."""

    def made(name: str) -> Tiny:
        torch.manual_seed(0)
        return MAKERS[name]()

    return made


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


@every_pipeline
@pytest.mark.parametrize("text", ["unipc:order=2", "ddim", "euler", "ddim:afs=zero_x0", "unipc:order=2,afs=zero_x0"])
def test_swapped_runs_are_counted_and_repeat(name: str, text: str, make: Callable[[str], Tiny]) -> None:
    """An analytic first step costs no evaluation, so every recipe makes the calls that were asked for."""
    tiny = make(name)
    old, before = tiny.pipe.scheduler, tiny(4)
    with swap(tiny.pipe, text):
        with tiny.counting() as batches:
            out = tiny(4)
        assert batches == [tiny.rows] * (4 * tiny.calls)
        assert out.isfinite().all()
        assert torch.equal(tiny(4), out)
        assert not torch.equal(tiny(4, seed=8), out)
    assert tiny.pipe.scheduler is old
    assert not tiny.denoiser._forward_pre_hooks
    assert torch.equal(tiny(4), before)


@every_pipeline
def test_first_order_equals_in_tree(name: str, make: Callable[[str], Tiny]) -> None:
    tiny = make(name)
    own: dict[str, Any] = {} if tiny.sigmas is None else {"sigmas": tiny.sigmas}
    with tiny.cutting_timesteps() if tiny.whole_steps else nullcontext():
        for text, cls, options in tiny.first_order:
            tiny.pipe.scheduler = cls.from_config(tiny.pipe.scheduler.config, **options)
            expected = tiny(8)
            with swap(tiny.pipe, text):
                assert relative(tiny(8, **own), expected) < 1e-4
            with swap(tiny.pipe, "dpmpp:order=2"):
                assert relative(tiny(8, **own), expected) > 1e-4  # the comparison can tell solvers apart


@pytest.mark.parametrize("strength", [0.25, 0.5, 0.75])
def test_a_noisy_video_is_not_taken_for_noise(strength: float, make: Callable[[str], Tiny]) -> None:
    """This pipeline never says where in the schedule it begins; the network's first input shows an analytic first step."""
    tiny = make("wan_v2v")
    tiny.inputs["strength"] = strength
    expected = tiny(8)
    with swap(tiny.pipe, "euler"):
        assert relative(tiny(8), expected) < 1e-4
    with swap(tiny.pipe, "euler:afs=zero_x0"), tiny.counting() as batches:
        out = tiny(8)
        times = tiny.pipe.scheduler.solver_schedule.times[1:]  # without the analytic step
    assert len(batches) == tiny.calls * int(8 * strength)
    plain = parse_recipe("euler").schedule(NoiseSchedule.flow(), 8, at=times)
    with swap(tiny.pipe, plain):
        assert relative(out, tiny(8)) < 1e-6


@pytest.mark.parametrize("options", [{"eta": 1.0}, {"use_clipped_model_output": True}])
def test_noise_is_the_recipes(options: dict[str, Any], make: Callable[[str], Tiny]) -> None:
    tiny = make("ddim")
    with swap(tiny.pipe, "ddim"), pytest.raises(ValueError, match="choose noise in the recipe, as in 'ddim:eta=1'"):
        tiny(4, **options)

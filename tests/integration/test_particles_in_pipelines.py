"""Correctors inside real pipelines: all kinds run, what is not exact is refused, and nothing is left behind."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLAutoBlocks,
)
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from samplers.particles import FeynmanKac, Target
from samplers.particles.hooks.plans import noise_matches_drift, plan_of
from samplers.reference import load
from samplers.schedulers import SolverScheduler, swap

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
Build = Callable[[str], Any]
Gen = Callable[..., torch.Generator]


# ---- tiny pipelines of every kind ------------------------------------------------------------------------------------------


def corrected(
    tiny: Any, target: Target, steps: int = 4, k: int = 3, recipe: str = "euler_ancestral", **options: Any
) -> tuple[Any, Any]:
    embeddings = {n: v[:1] for n, v in tiny.inputs.items() if "embeds" in n}
    inputs = {**tiny.inputs, **embeddings, "generator": torch.Generator().manual_seed(0)}
    if "class_labels" in inputs:
        inputs["class_labels"] = [1]
    if "batch_size" in inputs:
        inputs["batch_size"] = 1
    torch.manual_seed(0)  # some pipelines pass no generator to their scheduler
    with swap(tiny.pipe, recipe), FeynmanKac(target, ess=1.0).attach(tiny.pipe, k, **options) as run:
        images = tiny.pipe(num_inference_steps=steps, **inputs)[0]
    return torch.as_tensor(images), run


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux", "dit", "wan"])
def test_pipelines_of_every_kind(kind: str, build: Build) -> None:
    tiny = build(kind)
    if kind == "flux":
        torch.manual_seed(1)
        negative = {"negative_prompt_embeds": torch.randn(2, 5, 16), "negative_pooled_prompt_embeds": torch.randn(2, 16)}
        tiny.inputs |= negative
    images, run = corrected(tiny, Target.cfg(3.0))
    assert images.shape[0] == 3
    assert bool(images.isfinite().all())
    assert run.log_w.shape == (3,)
    assert run.log_z.shape == (1,)
    assert run.ess.shape == (4, 1)
    assert set(run.approximations) <= {"signal where the noise starts"}
    assert float(run.ess.min()) < 3 - 1e-9
    one, run = corrected(tiny, Target.cfg(3.0), pick="max", batch_size=2)
    assert one.shape[0] == 1
    torch.testing.assert_close(one[0], images[int(run.kept[0])], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["sd", "flux", "ddpm"])
def test_steering_needs_no_branches(kind: str, build: Build) -> None:
    """A reward alone corrects whatever the pipeline samples, guided or distilled."""
    seen: list[tuple[int, ...]] = []

    def reward(x0: Tensor) -> Tensor:
        seen.append(tuple(x0.shape))
        return x0.flatten(1).float().mean(-1)

    images, run = corrected(build(kind), Target.power(1.0).with_reward(reward, 5.0))
    assert len(seen) == 5  # four predictions and the result
    assert images.shape[0] == 3
    assert float(run.log_w.std() if not run.trace.resampled[-1].any() else run.ess.min()) > 0


def test_rewards_of_decoded_images(build: Build) -> None:
    seen: list[Tensor] = []

    def reward(image: Tensor) -> Tensor:
        seen.append(image)
        return image.mean((1, 2, 3))

    corrected(build("sd"), Target.power(1.0).with_reward(reward), decode="image")
    assert seen[0].shape[:2] == (3, 3)
    assert float(seen[-1].min()) >= 0.0
    assert float(seen[-1].max()) <= 1.0


@pytest.mark.parametrize("kind", ["sd", "dit"])
def test_nothing_is_left_behind(kind: str, build: Build) -> None:
    tiny = build(kind)
    before, attributes = tiny(3), (vars(tiny.pipe).keys(), set(vars(tiny.pipe.scheduler)), set(vars(tiny.denoiser)))
    cls = type(tiny.pipe)
    corrected(tiny, Target.cfg(2.0), batch_size=1)
    with pytest.raises(RuntimeError, match="on purpose"), tiny.failing_at(1):
        corrected(tiny, Target.cfg(2.0))
    after = (vars(tiny.pipe).keys(), set(vars(tiny.pipe.scheduler)), set(vars(tiny.denoiser)))
    assert after == attributes
    assert type(tiny.pipe) is cls
    assert torch.equal(tiny(3), before)


def test_one_particle_is_the_plain_pipeline(generator: Gen) -> None:
    pipe = load("digits-conditional")
    plain = pipe([3, 4], guidance_scale=2.0, num_inference_steps=5, generator=generator(), output_type="pt").images
    with FeynmanKac(Target.cfg(2.0)).attach(pipe, 1):
        same = pipe([3, 4], num_inference_steps=5, generator=generator(), output_type="pt").images
    assert torch.equal(plain, same)


def test_particles_of_class_labels(generator: Gen) -> None:
    pipe = load("digits-conditional")
    with FeynmanKac(Target.cfg(2.0)).attach(pipe, 4) as run:
        first = pipe([3, 5], num_inference_steps=6, generator=generator(), output_type="pt").images
        again = pipe([3] * 4 + [5] * 4, num_inference_steps=6, generator=generator(), output_type="pt").images
        assert torch.equal(first, again)
        seeds = pipe([3, 5], num_inference_steps=6, generator=[generator(0), generator(1)], output_type="pt").images
    assert len(first) == len(seeds) == 8
    assert run.log_w.shape == (8,)
    assert run.approximations["x0 values clipped by the scheduler"] > 0


# ---- refusals: before any network call, with the reason ---------------------------------------------------------------------


def refused(
    tiny: Any, target: Target, match: str, recipe: str | None = "euler_ancestral", settings: Any = None, **call: Any
) -> None:
    def attempt() -> None:
        scheduler = nullcontext() if recipe is None else swap(tiny.pipe, recipe)
        with scheduler, FeynmanKac(target, **(settings or {})).attach(tiny.pipe, 2):
            tiny.pipe(num_inference_steps=3, **{**tiny.inputs, **call})

    with tiny.counting() as calls, pytest.raises(ValueError, match=match):
        attempt()
    assert calls == []


def test_refusals(build: Build) -> None:
    sd, guided = build("sd"), Target.cfg(2.0)
    refused(sd, guided, "guidance_rescale", guidance_rescale=0.5)
    refused(sd, guided, r"guidance_scale=7.5, but the target is cfg\(2\)", guidance_scale=7.5)
    refused(sd, guided, "num_images_per_prompt=5", num_images_per_prompt=5)
    refused(sd, guided, "is an ODE", recipe="unipc:order=3")
    refused(sd, guided, "DDIM without noise is an ODE", recipe=None)
    refused(sd, guided, "does not match .fresh", recipe="lcm")
    refused(sd, Target.power(2.0), r"exponents with sum 2 need another start")
    refused(sd, Target.compose(a=0.5, b=0.5), "has the branches uncond and cond")
    refused(sd, guided, "noise=0.5", settings={"noise": 0.5})
    sd.pipe.scheduler.register_to_config(thresholding=True)
    refused(sd, guided, "dynamic thresholding", recipe="ddpm")
    sd.pipe.scheduler.register_to_config(thresholding=False)
    refused(sd, Target.cfg(lambda t: 2.0), "full noise of the reverse SDE", recipe="ddim:eta=0.5")
    sd.pipe.scheduler = EulerDiscreteScheduler(**BETAS)
    refused(sd, guided, "EulerDiscreteScheduler does not draw the noise", recipe=None)
    refused(build("sd3"), guided, "FlowMatchEulerDiscreteScheduler does not draw", recipe=None)
    refused(build("ddpm"), guided, "no classifier-free guidance", recipe=None)
    sd.pipe.scheduler = DDPMScheduler(variance_type="fixed_large", **BETAS)
    refused(sd, guided, "draws more noise than its drift", recipe=None)
    flux = build("flux")
    flux.pipe.transformer.register_to_config(guidance_embeds=True)
    refused(flux, guided, "distilled guidance")


@pytest.mark.parametrize(
    ("recipe", "exact"),
    [
        ("dpmpp_sde", True),
        ("dpmpp_sde:eta=0.5", True),
        ("sa_solver:order=3", True),
        ("dpmpp_sde:s_noise=1.1", False),
        ("euler_ancestral:s_noise=1.003", False),
    ],
)
def test_noise_is_held_against_the_drift(recipe: str, exact: bool) -> None:
    """By the spread that every state has where the data is a point; scaled noise is exact where it makes up the level's."""
    scheduler = SolverScheduler.from_config(DDPMScheduler(**BETAS).config, schedule=recipe)
    scheduler.set_timesteps(9)
    start = scheduler.noise_schedule.sigma(scheduler.solver_schedule.times[0])
    assert noise_matches_drift(scheduler.tableau, float(start)) is exact
    with nullcontext() if exact else pytest.raises(ValueError, match="that its drift does not match"):
        plan_of(scheduler, exact=True, resamples=True, eta=None)


def test_flux_without_a_negative_prompt_says_so(build: Build) -> None:
    with pytest.raises(ValueError, match=r"made 1 network call[\s\S]*negative"):
        corrected(build("flux"), Target.cfg(2.0))


def test_guidance_that_is_not_a_mix_is_noticed(build: Build) -> None:
    """A normalised mix, as some pipelines make, names no law."""
    tiny = build("sd")
    with swap(tiny.pipe, "euler_ancestral") as scheduler:
        original = scheduler.step
        with FeynmanKac(Target.cfg(2.0)).attach(tiny.pipe, 2):
            inner = tiny.pipe.scheduler.step
            tiny.pipe.scheduler.step = lambda output, *a, **k: inner(0.9 * output, *a, **k)
            with pytest.raises(ValueError, match="more to its guidance branches than mix them"):
                tiny.pipe(num_inference_steps=3, **tiny.inputs)
        assert scheduler.step == original


class ModularLike:
    """The denoising loop of a modular pipeline: a real guider, and one network call per branch."""

    def __init__(self, tiny: Any, guider: ClassifierFreeGuidance) -> None:
        self.unet, self.scheduler, self.guider, self.inputs = tiny.pipe.unet, tiny.pipe.scheduler, guider, tiny.inputs

    @torch.no_grad()
    def __call__(self, num_inference_steps: int, batch: int, generator: torch.Generator) -> tuple[Tensor]:
        self.scheduler.set_timesteps(num_inference_steps)
        latents = torch.randn(batch, 4, 8, 8, generator=generator)
        embeds = [self.inputs[name][:1].expand(batch, -1, -1) for name in ("prompt_embeds", "negative_prompt_embeds")]
        for i, t in enumerate(self.scheduler.timesteps):
            self.guider.set_state(step=i, num_inference_steps=num_inference_steps, timestep=t)
            states = self.guider.prepare_inputs({"embeds": tuple(embeds)})
            for state in states:
                state.noise_pred = self.unet(latents, t, state.embeds).sample
            latents = self.scheduler.step(self.guider(states)[0], t, latents, generator=generator, return_dict=False)[0]
        return (latents,)


def test_modular_guider(build: Build, generator: Gen) -> None:
    guider = ClassifierFreeGuidance(guidance_scale=3.0)
    tiny = build("sd")
    with swap(tiny.pipe, "euler_ancestral"):
        modular = ModularLike(tiny, guider)
        with FeynmanKac(Target.cfg(3.0), ess=1.0).attach(modular, 4, pick="max") as run:
            (latents,) = modular(num_inference_steps=4, batch=4, generator=generator())
        assert latents.shape[0] == 1
        assert float(run.ess.min()) < 4
        assert "forward" not in vars(guider)
        rescaled = ModularLike(tiny, ClassifierFreeGuidance(guidance_scale=3.0, guidance_rescale=0.5))
        with pytest.raises(ValueError, match="the guider rescales"), FeynmanKac(Target.cfg(3.0)).attach(rescaled, 4):
            rescaled(num_inference_steps=4, batch=4, generator=generator())


def test_modular_sdxl(build: Build, generator: Gen) -> None:
    """The modular pipeline itself, from embeddings to images."""
    tiny, blocks = build("sdxl"), StableDiffusionXLAutoBlocks()
    for name in ("text_encoder", "ip_adapter", "vae_encoder"):
        blocks.sub_blocks.pop(name)
    pipe = blocks.init_pipeline()
    pipe.update_components(
        unet=tiny.pipe.unet,
        vae=tiny.pipe.vae,
        scheduler=EulerAncestralDiscreteScheduler.from_config(tiny.pipe.scheduler.config),
        guider=ClassifierFreeGuidance(guidance_scale=3.0),
        image_processor=VaeImageProcessor(vae_scale_factor=1),
    )
    inputs = {name: value[:1] for name, value in tiny.inputs.items() if "embeds" in name}

    def call() -> Tensor:
        return pipe(
            **inputs, num_inference_steps=3, height=8, width=8, generator=generator(), output="images", output_type="pt"
        )

    before = call()
    with FeynmanKac(Target.cfg(3.0), ess=1.0).attach(pipe, 3) as run:
        images = call()
    assert images.shape == (3, 3, 8, 8)
    assert float(run.ess.min()) < 3 - 1e-9
    with FeynmanKac(Target.cfg(3.0), ess=1.0).attach(pipe, 3, pick="max", batch_size=2) as run:
        best = call()
    torch.testing.assert_close(best[0], images[int(run.kept[0])], atol=1e-4, rtol=1e-4)
    assert torch.equal(call(), before)

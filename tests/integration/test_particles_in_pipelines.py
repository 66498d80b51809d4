"""Correctors inside real pipelines: exact models give the law that was asked for, and nothing is left behind."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from diffusers.guiders import ClassifierFreeGuidance
from torch import Tensor

from samplers import Evaluation, NoiseSchedule, SolverSchedule, StepStrategy
from samplers.denoisers import GaussianMixture
from samplers.particles import FeynmanKac, Target
from samplers.particles.hooks import run as hooks_run
from samplers.particles.hooks.plans import noise_matches_drift, plan_of
from samplers.reference import ClassConditionalPipeline, load
from samplers.schedulers import SolverScheduler, swap

UNCOND = GaussianMixture(torch.tensor([[-2.0], [0.0], [2.0]]), torch.tensor([0.4, 0.5, 0.4]).sqrt(), torch.tensor([8.0, 7, 5]))
COND = GaussianMixture(torch.tensor([[1.6], [-1.8]]), torch.tensor([0.2, 0.25]).sqrt(), torch.tensor([0.8, 0.2]))
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
EDGES = torch.linspace(-6, 6, 61, dtype=torch.float64)
Build = Callable[[str], Any]
Gen = Callable[..., torch.Generator]


class ExactUNet(torch.nn.Module):
    """eps of two known mixtures: class 0 is conditional, class 1 means no class."""

    def __init__(self, scheduler: Any) -> None:
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(()))
        self.config = SimpleNamespace(num_class_embeds=2, sample_size=1, in_channels=1, get=lambda name: None)
        self.noise_schedule = NoiseSchedule.from_config(scheduler.config)
        self.scaled = type(scheduler).__name__.startswith("Euler")

    @property
    def device(self) -> torch.device:
        return self.anchor.device

    @property
    def dtype(self) -> torch.dtype:
        return self.anchor.dtype

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor, return_dict: bool) -> tuple[Tensor]:
        alpha, sigma = self.noise_schedule.alpha_sigma(self.noise_schedule.t_of_timestep(t.double()))
        flat = x.flatten(1).double()
        score = torch.where(class_labels[:, None] == 0, COND.score(flat, alpha, sigma), UNCOND.score(flat, alpha, sigma))
        return ((-sigma * score).reshape(x.shape).to(x.dtype),)


def exact_pipeline(scheduler: Any) -> ClassConditionalPipeline:
    pipe = ClassConditionalPipeline(unet=ExactUNet(scheduler), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def truth(w: float, level: float = 0.029) -> Tensor:
    """Bin masses of the target at the noise level where a run of 1000 training steps ends."""
    fine = torch.linspace(-8, 8, 16001, dtype=torch.float64)
    a = 1 / (1 + level**2) ** 0.5
    log_p = (1 - w) * UNCOND.log_prob(fine[:, None], a, a * level) + w * COND.log_prob(fine[:, None], a, a * level)
    return binned(fine, log_p.softmax(0))


def binned(x: Tensor, w: Tensor) -> Tensor:
    place = (torch.bucketize(x, EDGES) - 1).clamp(0, len(EDGES) - 2)
    return torch.zeros(len(EDGES) - 1, dtype=torch.float64).scatter_add(0, place, w)


def total_variation(
    pipe: Any, w: float, steps: int, particles: int, seed: int, found: list[float] | None = None, **settings: Any
) -> float:
    """Against the target, of latents at the last evaluation: the pipeline clips what it returns to the image range.

    log Z goes to ``found``.
    """
    seen: list[Tensor] = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with FeynmanKac(Target.cfg(w), **settings).attach(pipe, particles) as run:
        pipe(0, num_inference_steps=steps, generator=torch.Generator().manual_seed(seed), output_type="pt")
    hook.remove()
    weights = run.log_w.softmax(0)
    if found is not None:
        found.append(float(run.log_z))
    # the last call's input is before the last resampling, whose ancestors say which rows went on
    x = seen[-1][:particles].flatten().double()[run.ancestors[-1, 0]]
    return float(0.5 * (binned(x, weights) - truth(w)).abs().sum())


SCHEDULERS = {
    "euler ancestral": lambda: EulerAncestralDiscreteScheduler(**BETAS),
    "ddpm": lambda: DDPMScheduler(clip_sample=False, **BETAS),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULERS)
def test_corrected_guidance_follows_its_law(name: str) -> None:
    pipe = exact_pipeline(SCHEDULERS[name]())
    plain = total_variation(pipe, 3.0, 100, 20_000, 0, weight_window=(0, 0))
    right = total_variation(pipe, 3.0, 100, 20_000, 0)
    assert plain > 2.5 * right


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["ddim:eta=1", "ddpm", "sa_solver:order=2"])
def test_solver_schedules_take_part_through_their_noise(recipe: str) -> None:
    pipe = exact_pipeline(DDIMScheduler(clip_sample=False, **BETAS))
    with swap(pipe, recipe):
        plain = total_variation(pipe, 3.0, 100, 10_000, 0, weight_window=(0, 0))
        right = total_variation(pipe, 3.0, 100, 10_000, 0)
    assert plain > 1.8 * right


@pytest.mark.slow
def test_noise_that_two_steps_share_is_exact() -> None:
    """DPM-Solver++ SDE: a step takes over what was drawn at its middle. Steps are long, so it needs many."""
    pipe = exact_pipeline(DDIMScheduler(clip_sample=False, **BETAS))
    with swap(pipe, "dpmpp_sde"):
        plain = total_variation(pipe, 3.0, 300, 2500, 0, weight_window=(0, 0))
        right = total_variation(pipe, 3.0, 300, 2500, 0)
    assert plain > 2.5 * right


def churned(ns: NoiseSchedule, gamma: float, steps: int = 100) -> SolverSchedule:
    """Karras et al. 2022, algorithm 2, on first-order steps: noise raises every level s to (1 + gamma) s before its step."""
    lam = torch.linspace(float(ns.lam(1.0)), -math.log(0.029), steps + 1, dtype=torch.float64)
    t, up = ns.t_of_lam(lam).tolist(), ns.t_of_lam(lam[1:-1] - math.log1p(gamma)).tolist()
    times = [t[0], t[1], *(time for raised, to in zip(up, t[2:], strict=True) for time in (raised, to)), 0.0]
    jump, euler = StepStrategy(eval=Evaluation(source="none")), StepStrategy()
    return SolverSchedule(times=tuple(times), steps=(euler, *(jump, euler) * (steps - 1), euler))


@pytest.mark.slow
def test_churn_is_paid_by_the_net_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    """What noise adds between two steps is taken off the weights again; counting each step's whole way down is wrong."""
    pipe, gamma = exact_pipeline(DDIMScheduler(clip_sample=False, **BETAS)), 0.02
    ns = NoiseSchedule.from_config(pipe.scheduler.config)
    fine = torch.linspace(-10, 10, 20001, dtype=torch.float64)[:, None]
    alpha, sigma = (v / math.hypot(1.0, 0.029) for v in (1.0, 0.029))
    log_p = 3 * COND.log_prob(fine, alpha, sigma) - 2 * UNCOND.log_prob(fine, alpha, sigma)
    log_z = float(log_p.logsumexp(0) + (fine[1] - fine[0]).log())

    def outcome(**settings: Any) -> tuple[float, float]:
        found: list[float] = []
        with swap(pipe, churned(ns, gamma).to_dict()):
            tv = total_variation(pipe, 3.0, 101, 6000, 0, found=found, **settings)
        return tv, found[0] - log_z

    plain, _ = outcome(weight_window=(0, 0))
    right, off = outcome()
    assert plain > 2.5 * right
    assert abs(off) < 0.3
    original = hooks_run.log_interval
    monkeypatch.setattr(hooks_run, "log_interval", lambda a, b: original(a, b) and original(a, b) + 2 * math.log1p(gamma))
    wrong, off = outcome()
    assert wrong > 2.0 * right
    assert abs(off) > 1.0


@pytest.mark.slow
def test_the_wrong_sign_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = exact_pipeline(SCHEDULERS["ddpm"]())
    right = total_variation(pipe, 3.0, 100, 10_000, 0)
    original = hooks_run.log_interval
    monkeypatch.setattr(hooks_run, "log_interval", lambda now, after: -original(now, after))
    assert total_variation(pipe, 3.0, 100, 10_000, 0) > 2.5 * right


def test_log_z_agrees_with_the_native_loop(generator: Gen) -> None:
    """Two implementations of the path, one estimate."""
    scheduler = SCHEDULERS["ddpm"]()
    pipe = exact_pipeline(scheduler)
    with FeynmanKac(Target.cfg(2.0)).attach(pipe, 4000) as run:
        pipe(0, num_inference_steps=60, generator=generator(), output_type="pt")
    ns = NoiseSchedule.from_config(scheduler.config)
    times = ns.t_of_timestep(scheduler.timesteps.double())
    models = {"uncond": UNCOND.denoiser(ns), "cond": COND.denoiser(ns)}
    cloud = FeynmanKac(Target.cfg(2.0)).sample(models, ns, times, particles=4000, shape=(1,), generator=generator(1))
    assert float(run.log_z[0]) == pytest.approx(float(cloud.log_z), abs=0.12)
    assert abs(float(cloud.log_z)) > 0.5


@pytest.mark.slow
def test_scheduled_guidance_follows_its_densities(generator: Gen, monkeypatch: pytest.MonkeyPatch) -> None:
    """log Z of a guidance scale that grows along the path, in the pipeline and natively; without the tracker it is wrong."""

    def scale(t: float) -> float:
        return 1.0 + 2.0 * (1.0 - t)

    scheduler = SCHEDULERS["euler ancestral"]()
    pipe, fk = exact_pipeline(scheduler), FeynmanKac(Target.cfg(scale))

    def estimate() -> float:
        with fk.attach(pipe, 4000) as run:
            pipe(0, num_inference_steps=80, generator=generator(), output_type="pt")
        return float(run.log_z)

    found = estimate()
    ns = NoiseSchedule.from_config(scheduler.config)
    times = ns.t_of_timestep(scheduler.timesteps.double())
    models = {"uncond": UNCOND.denoiser(ns), "cond": COND.denoiser(ns)}
    cloud = fk.sample(models, ns, times, particles=4000, shape=(1,), generator=generator(1))
    (alpha, sigma), w = ns.alpha_sigma(times[-1]), scale(float(times[-1]))
    fine = torch.linspace(-10, 10, 20001, dtype=torch.float64)[:, None]
    log_p = (1 - w) * UNCOND.log_prob(fine, alpha, sigma) + w * COND.log_prob(fine, alpha, sigma)
    exact = float(log_p.logsumexp(0) + (fine[1] - fine[0]).log())
    assert found == pytest.approx(exact, abs=0.35)
    assert float(cloud.log_z) == pytest.approx(exact, abs=0.35)
    monkeypatch.setattr(hooks_run, "log_density_change", lambda eps, *rest: torch.zeros(len(eps), dtype=torch.float64))
    assert abs(estimate() - exact) > 0.5


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
    refused(sd, Target.cfg(lambda t: 2.0), "full noise of the reverse SDE", recipe="ddim:eta=0.5")
    sd.pipe.scheduler = EulerDiscreteScheduler(**BETAS)
    refused(sd, guided, "EulerDiscreteScheduler does not draw the noise", recipe=None)
    refused(build("sd3"), guided, "FlowMatchEulerDiscreteScheduler does not draw", recipe=None)
    refused(build("ddpm"), guided, "no classifier-free guidance", recipe=None)
    large = build("ddpm")
    large.pipe.scheduler = DDPMScheduler(variance_type="fixed_large")
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

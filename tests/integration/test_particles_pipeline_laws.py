"""Correctors inside a pipeline whose model is exact: weighted images follow the law that was asked for."""

import math
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
)
from torch import Tensor

from samplers import Evaluation, NoiseSchedule, SolverSchedule, StepStrategy
from samplers.denoisers import GaussianMixture
from samplers.particles import FeynmanKac, Target
from samplers.particles.hooks import run as hooks_run
from samplers.reference import ClassConditionalPipeline
from samplers.schedulers import swap

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
        time = self.noise_schedule.t_of_timestep(t.double())
        flat = x.flatten(1).double()
        if self.noise_schedule.family == "flow":
            return (((flat - COND.denoiser(self.noise_schedule)(flat, time)) / time).reshape(x.shape).to(x.dtype),)
        alpha, sigma = self.noise_schedule.alpha_sigma(time)
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


FRESH = {
    "lcm": lambda: LCMScheduler(clip_sample=False, **BETAS),
    "tcd": lambda: TCDScheduler(clip_sample=False, **BETAS),
    "flow": lambda: flow_scheduler(),
}


def flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """With the two names that pipelines of flow models do without, and the digits' pipeline asks for."""
    scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    scheduler.init_noise_sigma, scheduler.scale_model_input = 1.0, lambda sample, t: sample
    return scheduler


@pytest.mark.parametrize("name", FRESH)
def test_rewards_tilt_samplers_that_draw_noise_of_their_own(name: str, generator: Gen) -> None:
    """Against the same sampler's images, weighed by the reward."""
    pipe = exact_pipeline(FRESH[name]())
    plain = pipe([0] * 4000, num_inference_steps=6, generator=generator(), output_type="pt").images.flatten().double()
    values = plain * 2 - 1
    expected = float((values * (2.0 * values).softmax(0)).sum())
    target = Target.power(1.0).with_reward(lambda x0: x0.flatten(1)[:, 0].clamp(-1, 1), 2.0, every=2)
    with FeynmanKac(target, ess=1.0).attach(pipe, 4000, pick="all") as run:
        x = pipe([0], num_inference_steps=6, generator=generator(1), output_type="pt").images.flatten().double() * 2 - 1
    assert bool(torch.stack(run.trace.resampled).any())
    assert float((x * run.log_w.softmax(0)).sum()) == pytest.approx(expected, abs=0.05)
    assert abs(float(values.mean()) - expected) > 0.2
    with pytest.raises(ValueError, match="does not draw the noise"), FeynmanKac(Target.cfg(2.0)).attach(pipe, 2):
        pipe([0], num_inference_steps=3)


def test_steps_uniform_in_log_snr_are_the_shortest(generator: Gen) -> None:
    pipe, longest = exact_pipeline(SCHEDULERS["ddpm"]()), {}
    for recipe in ("ddpm", "ddpm:grid=logsnr"):
        with swap(pipe, recipe), FeynmanKac(Target.cfg(2.0)).attach(pipe, 2) as run:
            pipe([0], num_inference_steps=8, generator=generator(), output_type="pt")
        levels = [level.ratio for level in run.steps.plan.levels[:-1]]
        longest[recipe] = run.longest_step
        assert run.longest_step == pytest.approx(max(math.log(a / b) for a, b in pairwise(levels)))
    assert longest["ddpm:grid=logsnr"] < 0.6 * longest["ddpm"]

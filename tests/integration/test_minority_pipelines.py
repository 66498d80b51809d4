"""Minority guidance around unmodified pipelines of every kind."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from torch import Tensor

from samplers import NoiseSchedule, recipe, sample
from samplers.denoisers import from_pipeline
from samplers.guidance import MinorityClassifier, boost_and_skip, guided_denoiser, minority_guidance, self_minority_guidance
from samplers.particles import FeynmanKac, Target
from samplers.reference import load
from samplers.schedulers import swap

STATES = {"sd": (4, 8, 8), "sdxl": (4, 8, 8), "sd3": (8, 8, 8), "flux": (64, 4), "dit": (4, 8, 8), "ddpm": (3, 8, 8)}
KINDS = sorted(STATES)


def classifier_for(shape: tuple[int, ...], **options: Any) -> MinorityClassifier:
    return MinorityClassifier(shape, 4, network="mlp", width=16, depth=1, **options).eval()


def weights_of(module: torch.nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_acts_and_leaves_no_trace(kind, build):
    tiny = build(kind)
    classifier = classifier_for(STATES[kind])
    before, weights = tiny(3), weights_of(tiny.denoiser)
    with minority_guidance(tiny.pipe, classifier, scale=20.0) as run:
        guided = tiny(3)
    assert run.evaluations == 3
    assert run.guided >= 2  # flow models begin at alpha = 0, where there is nothing to classify
    assert run.dropped == 0
    assert not torch.equal(guided, before)
    with minority_guidance(tiny.pipe, classifier, scale=0.0) as run:
        assert torch.equal(tiny(3), before)
    assert run.guided == 0
    assert torch.equal(tiny(3), before)
    assert "forward" not in vars(tiny.denoiser)
    assert all(torch.equal(a, b) for a, b in zip(weights, tiny.denoiser.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_any_solver_schedule_and_errors_leave_no_trace(kind, build):
    tiny = build(kind)
    classifier = classifier_for(STATES[kind])
    before = tiny(3)
    for sampler in ("unipc:order=3", "dpmpp:order=2", "ddpm"):
        with swap(tiny.pipe, sampler), minority_guidance(tiny.pipe, classifier, scale=20.0) as run:
            tiny(4)
        assert run.evaluations == 4
    with pytest.raises(RuntimeError, match="on purpose"), minority_guidance(tiny.pipe, classifier), tiny.failing_at(1):
        tiny(3)
    assert torch.equal(tiny(3), before)


@pytest.mark.parametrize("kind", ["sd", "sd3", "flux", "sdxl"])
def test_pipelines_and_the_native_loop_agree(kind, build):
    """Both halves of a guided batch get the same shift, which passes classifier-free guidance with weight one."""
    tiny = build(kind)
    classifier = classifier_for(STATES[kind])
    noise = NoiseSchedule.from_config(tiny.pipe.scheduler.config)
    given = {key: value for key, value in tiny.inputs.items() if key != "output_type"}
    denoiser, _, shape = from_pipeline(tiny.pipe, **given)
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(3))
    text = "dpmpp:order=2,grid=logsnr"
    schedule = recipe(text, noise, 4)
    native = sample(guided_denoiser(denoiser, noise, classifier, 20.0), x, schedule, noise)
    with swap(tiny.pipe, text), minority_guidance(tiny.pipe, classifier, scale=20.0):
        out = tiny(4, latents=x)
    torch.testing.assert_close(out, native, rtol=2e-3, atol=2e-3)
    with swap(tiny.pipe, text):
        assert not torch.allclose(tiny(4, latents=x), out, atol=1e-2)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("sd", torch.float16), ("sd", torch.bfloat16), ("ddpm", torch.float16), ("flux", torch.bfloat16)]
)
def test_half_precision(kind, dtype, build):
    tiny = build(kind)
    classifier = classifier_for(STATES[kind])
    with minority_guidance(tiny.pipe, classifier, scale=20.0):
        wide = tiny(3)
    tiny.pipe.to(dtype)
    inputs = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in tiny.inputs.items()}
    with minority_guidance(tiny.pipe, classifier, scale=20.0) as run:
        narrow = tiny(3, **inputs)
    assert run.dropped == 0
    assert torch.isfinite(narrow).all()
    if kind != "flux":  # whose bfloat16 timesteps are other times
        assert (narrow.float() - wide).abs().mean() < 0.1 * wide.abs().mean()


@pytest.mark.parametrize("kind", ["sd", "dit", "sd3", "ddpm", "flux"])
def test_self_guidance(kind, build):
    tiny = build(kind)
    before, flags = tiny(4), [p.requires_grad for p in tiny.denoiser.parameters()]
    with self_minority_guidance(tiny.pipe, scale=5.0, every=2, generator=torch.Generator().manual_seed(0)) as run:
        guided = tiny(4)
    assert run.evaluations == 4
    assert 1 <= run.guided <= 2
    assert run.extra_evaluations == run.guided
    assert torch.isfinite(guided).all()
    assert not torch.equal(guided, before)
    assert [p.requires_grad for p in tiny.denoiser.parameters()] == flags
    with self_minority_guidance(tiny.pipe, scale=0.0):
        assert torch.equal(tiny(4), before)
    assert torch.equal(tiny(4), before)


@pytest.mark.parametrize("guided", ["classifier", "self"])
def test_inference_mode(guided, build):
    """Prompt embeddings made there are inference tensors, which no graph may save."""
    tiny, classifier = build("sd"), classifier_for(STATES["sd"])

    def block() -> Any:
        if guided == "classifier":
            return minority_guidance(tiny.pipe, classifier, scale=20.0)
        return self_minority_guidance(tiny.pipe, scale=5.0, every=1, generator=torch.Generator().manual_seed(0))

    with block():
        expected = tiny(3)
    with torch.inference_mode(), block():
        inputs = {k: v + 0.0 if torch.is_tensor(v) else v for k, v in tiny.inputs.items()}
        torch.testing.assert_close(tiny(3, **inputs), expected)


def test_self_guidance_moves_away_from_the_reconstruction(build):
    """One guided evaluation, by hand: the gradient of |x0 - x0''| through the first prediction only."""
    tiny = build("ddpm")
    pipe, noise = tiny.pipe, NoiseSchedule.from_config(tiny.pipe.scheduler.config)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    n = 400
    pipe.scheduler.set_timesteps(timesteps=[n])
    alpha, sigma = (v.item() for v in noise.alpha_sigma(noise.t_of_timestep(n)))
    second = noise.t_of_lam(0.5 * torch.tensor(0.09 / 0.91).log())
    alpha2, sigma2 = (v.item() for v in noise.alpha_sigma(second))
    state = x.clone().requires_grad_(True)
    a = (state - sigma * pipe.unet(state, torch.tensor(n)).sample) / alpha
    again = alpha2 * a.detach() + sigma2 * torch.randn(a.shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        b = (again - sigma2 * pipe.unet(again, noise.timestep(second).float()).sample) / alpha2
    gradient = torch.autograd.grad((a - b).flatten(1).norm(dim=1).sum(), state)[0]
    gradient = gradient / gradient.flatten(1).abs().amax(1)[:, None, None, None]
    plain = pipe.unet(x, torch.tensor(n)).sample.detach()
    with self_minority_guidance(pipe, scale=0.7, every=1, generator=torch.Generator().manual_seed(2)):
        guided = pipe.unet(x, torch.tensor(n)).sample
    torch.testing.assert_close(guided, plain - sigma * 0.7 * gradient, rtol=1e-4, atol=1e-5)


def test_class_conditional_guidance_uses_the_images_own_class_in_both_halves():
    """In a guided batch the unconditional half has no class; its shift must be the conditional half's all the same."""
    pipe = load("digits-conditional")
    classifier = classifier_for((1, 8, 8), classes=10)
    seen: list[Tensor] = []
    original = classifier.log_prob

    def log_prob(x: Tensor, alpha: float, sigma: float, class_labels: Tensor | None = None) -> Tensor:
        seen.append(class_labels)
        return original(x, alpha, sigma, class_labels)

    classifier.log_prob = log_prob
    with minority_guidance(pipe, classifier, scale=2.0):
        pipe([3, 7], guidance_scale=2.0, num_inference_steps=2, output_type="pt")
        pipe([3, 7], guidance_scale=1.0, num_inference_steps=2, output_type="pt")
    assert [labels.tolist() for labels in seen] == [[3, 7, 3, 7]] * 2 + [[3, 7]] * 2


def test_a_searched_schedule_is_guided_at_every_evaluation():
    """A shipped schedule, whose steps are of every kind the search knows; its number of evaluations is what guidance counts."""
    pipe, classifier = load("digits-conditional"), classifier_for((1, 8, 8))

    def images(scale: float) -> tuple[Tensor, Any]:
        generator = torch.Generator().manual_seed(0)
        with swap(pipe, "digits-conditional-nfe5"), minority_guidance(pipe, classifier, scale=scale) as run:
            return pipe([3, 7], guidance_scale=2.0, num_inference_steps=5, generator=generator, output_type="pt").images, run

    plain, _ = images(0.0)
    guided, run = images(20.0)
    assert (run.evaluations, run.guided, run.dropped) == (5, 5, 0)
    assert not torch.equal(plain, guided)


def test_every_window_and_label_per_image():
    pipe = load("digits")
    classifier = classifier_for((1, 8, 8))
    with minority_guidance(pipe, classifier, every=3) as run:
        pipe(batch_size=2, num_inference_steps=7, output_type="np")
    assert (run.evaluations, run.guided) == (7, 3)
    with minority_guidance(pipe, classifier, window=(0.5, 1.0)) as run:
        pipe(batch_size=2, num_inference_steps=10, output_type="np")
    assert (run.evaluations, run.guided) == (10, 3)  # alpha_bar of the timesteps 200, 100, 0 is above a half

    def images(label: Any) -> Tensor:
        with minority_guidance(pipe, classifier, scale=10.0, label=label):
            generator = torch.Generator().manual_seed(0)
            return torch.as_tensor(pipe(batch_size=2, num_inference_steps=6, generator=generator, output_type="np").images)

    mixed, low, high = images([0, 3]), images(0), images(-1)
    assert torch.allclose(mixed[0], low[0])
    assert torch.allclose(mixed[1], high[1])
    assert not torch.allclose(low, high)


def test_mean_form_needs_an_ancestral_scheduler_and_acts_after_clipping():
    pipe = load("digits")
    classifier = classifier_for((1, 8, 8))
    with minority_guidance(pipe, classifier, scale=5.0, form="mean") as run:
        pipe(batch_size=2, num_inference_steps=3, output_type="np")
    assert run.guided == 3
    assert "step" not in vars(pipe.scheduler)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="ancestral"), minority_guidance(pipe, classifier, form="mean"):
        pass
    with swap(pipe, "ddpm"), minority_guidance(pipe, classifier, scale=5.0, form="mean") as run:
        pipe(batch_size=2, num_inference_steps=3, output_type="np")
    assert run.guided == 3


def test_a_scheduler_changed_inside_the_block_is_noticed():
    """Where guidance works on the scheduler itself; the plain form follows the change."""
    pipe = load("digits")
    classifier = classifier_for((1, 8, 8))
    blocks = [lambda: minority_guidance(pipe, classifier, form="mean"), lambda: boost_and_skip(pipe, gamma=2.0, skip=1)]
    for block in blocks:
        with block(), swap(pipe, "ddpm"), pytest.raises(ValueError, match="outside the block"):
            pipe(batch_size=1, num_inference_steps=2, output_type="np")
    with minority_guidance(pipe, classifier) as run, swap(pipe, "ddpm"):
        pipe(batch_size=1, num_inference_steps=2, output_type="np")
    assert run.guided == 2


@pytest.mark.parametrize("scheduler", [DDPMScheduler, EulerAncestralDiscreteScheduler, "ddpm", "euler_ancestral"])
def test_boost_and_skip_starts_later_and_wider(scheduler):
    pipe = load("digits")
    states: list[Tensor] = []
    if not isinstance(scheduler, str):
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    hook = pipe.unet.conv_in.register_forward_pre_hook(lambda module, args: states.append(args[0]))

    def call(seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.as_tensor(pipe(batch_size=6, num_inference_steps=12, generator=generator, output_type="np").images)

    def check() -> None:
        before = call()
        plain = len(states)
        if "Euler" not in type(pipe.scheduler).__name__:  # DDPMPipeline starts in-tree Euler schedulers from unscaled noise
            with boost_and_skip(pipe, gamma=4.0, gain=2.5, top_variance=13.0) as run:
                out = call()
            assert 2 <= run.skipped <= 7
            assert len(states) - plain == 12 - run.skipped
            assert states[plain].std().item() == pytest.approx(4.0, rel=0.15)
            assert run.gain == pytest.approx(2.5, rel=0.5)  # of 12 steps, the nearest
            assert torch.isfinite(out).all()
        with boost_and_skip(pipe, gamma=3.0, skip=5) as run:
            states.clear()
            call()
        assert (run.skipped, len(states)) == (5, 7)
        assert torch.equal(call(), before)
        assert not {"step", "set_timesteps"} & set(vars(pipe.scheduler))

    if isinstance(scheduler, str):
        with swap(pipe, scheduler):
            check()
    else:
        check()
    hook.remove()


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler, "unipc:order=3", "ddim"])
def test_boost_and_skip_refuses_ode_samplers(scheduler):
    pipe = load("digits")
    if not isinstance(scheduler, str):
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        with pytest.raises(ValueError, match="draws no noise"), boost_and_skip(pipe, gamma=4.0, skip=2):
            pass
        return
    with swap(pipe, scheduler):
        with pytest.raises(ValueError, match="draws no noise"), boost_and_skip(pipe, gamma=4.0, skip=2):
            pass
        with boost_and_skip(pipe, gamma=1.5, skip=2, force=True) as run:
            pipe(batch_size=1, num_inference_steps=5, output_type="np")
        assert run.skipped == 2


def test_boost_and_skip_reads_the_top_variance_from_the_model():
    pipe = load("digits")
    with boost_and_skip(pipe, gamma=4.0, gain=2.5) as run:
        pipe(batch_size=1, num_inference_steps=40, output_type="np")
    assert 1.5 < run.gain < 4.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gain": 2.0, "skip": 3}, "not both"),
        ({"skip": -1}, "skip"),
        ({"gain": 0.5}, "gain must be above 1"),
        ({"gamma": 0.0}, "gamma"),
    ],
)
def test_bad_boosts_are_refused(arguments, message):
    pipe = load("digits")
    with pytest.raises(ValueError, match=message), boost_and_skip(pipe, **{"top_variance": 13.0, **arguments}):
        pass


def test_wrong_shapes_classes_and_pipelines_are_refused(build):
    pipe = load("digits")
    with pytest.raises(ValueError, match="samples of shape"), minority_guidance(pipe, classifier_for((3, 8, 8))):
        pipe(batch_size=1, num_inference_steps=1)
    with pytest.raises(ValueError, match="class_labels"), minority_guidance(pipe, classifier_for((1, 8, 8), classes=10)):
        pipe(batch_size=1, num_inference_steps=1)
    with (
        pytest.raises(ValueError, match="knows no classes"),
        minority_guidance(pipe, classifier_for((1, 8, 8)), class_labels=[1]),
    ):
        pass
    tiny: Callable[[], Any] = lambda: minority_guidance(build("sd").pipe, classifier_for((4, 8, 8)), label=9)  # noqa: E731
    with pytest.raises(ValueError, match="outside"), tiny():
        pass
    bare = DDPMPipeline(unet=pipe.unet, scheduler=pipe.scheduler)
    bare.unet = None
    with (
        pytest.raises(ValueError, match="neither a unet nor a transformer"),
        minority_guidance(bare, classifier_for((1, 8, 8))),
    ):
        pass


@pytest.mark.slow
def test_composes_with_a_reward_on_particles():
    """Both at once, in either order of the blocks: guided, and weighted by brightness."""
    pipe = load("digits")
    classifier = classifier_for((1, 8, 8))

    def brightness(reward: float, guided: bool, swapped: bool = False) -> float:
        target = Target.power(1.0).with_reward(lambda x0: x0.flatten(1).mean(1), reward)
        blocks = [lambda: FeynmanKac(target).attach(pipe, particles=8)]
        blocks += [lambda: minority_guidance(pipe, classifier, scale=20.0)] if guided else []
        with ExitStack() as stack:
            runs = [stack.enter_context(block()) for block in (blocks[::-1] if swapped else blocks)]
            generator = torch.Generator().manual_seed(0)
            images = pipe(batch_size=2, num_inference_steps=6, generator=generator, output_type="np").images
        assert not guided or runs[0 if swapped else 1].guided == 6
        return float(images.mean())

    assert brightness(40.0, guided=True) > brightness(0.0, guided=True) + 0.02
    assert brightness(40.0, guided=True) == pytest.approx(brightness(40.0, guided=True, swapped=True))
    assert brightness(0.0, guided=True) != brightness(0.0, guided=False)

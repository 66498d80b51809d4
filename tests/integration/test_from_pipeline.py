"""Pipelines as denoisers: the native loop with `from_pipeline` is the pipeline's own run, latents and pictures."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, EDMEulerScheduler, StableDiffusionPipeline
from torch import Tensor

from samplers import NoiseSchedule, SolverSchedule, recipe, sample
from samplers.denoisers import from_pipeline
from samplers.reference import load
from samplers.schedulers import swap
from search.pipeline_problem import pipeline_problem

NFE = 4


def _inputs(tiny: Any, **extra: Any) -> dict[str, Any]:
    return {key: value for key, value in {**tiny.inputs, **extra}.items() if key != "output_type"}


def _run(tiny: Any, schedule: SolverSchedule, output_type: str, **extra: Any) -> tuple[Tensor, Tensor]:
    """The starting noise and the pipeline's own output."""
    states: list[Tensor] = []

    def before(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        states.append(args[0] if args else kwargs.get("hidden_states", kwargs.get("sample")))

    hook = tiny.denoiser.register_forward_pre_hook(before, with_kwargs=True)
    try:
        with swap(tiny.pipe, schedule):
            out = tiny(NFE, **{**extra, "output_type": output_type})
    finally:
        hook.remove()
    return states[0], out


def _schedule(tiny: Any) -> tuple[SolverSchedule, NoiseSchedule]:
    noise = NoiseSchedule.from_config(tiny.pipe.scheduler.config)
    return recipe("unipc:order=2,grid=karras,clip=none", noise, NFE), noise


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "dit", "ddpm"])
def test_native_loop_is_the_pipeline(build: Callable[[str], Any], name: str) -> None:
    tiny = build(name)
    schedule, noise = _schedule(tiny)
    start, pictures = _run(tiny, schedule, "np")
    denoiser, decode, shape = from_pipeline(tiny.pipe, **_inputs(tiny))
    with tiny.counting() as batches:
        x = sample(denoiser, start[:2], schedule, noise)
    assert batches == [tiny.rows] * NFE
    assert x.shape[1:] == shape
    torch.testing.assert_close(decode(x).permute(0, 2, 3, 1), torch.as_tensor(pictures), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "options"), [("sd", {"guidance_rescale": 0.7}), ("sd", {"guidance_scale": 1.0})])
def test_guidance_variants(build: Callable[[str], Any], name: str, options: dict[str, Any]) -> None:
    tiny = build(name)
    schedule, noise = _schedule(tiny)
    start, latents = _run(tiny, schedule, "latent", **options)
    denoiser, _, _ = from_pipeline(tiny.pipe, **_inputs(tiny, **options))
    torch.testing.assert_close(sample(denoiser, start[:2], schedule, noise), latents, atol=2e-5, rtol=1e-4)


def test_two_calls_a_step(build: Callable[[str], Any]) -> None:
    """Flux with a negative prompt evaluates its network twice a step."""
    tiny = build("flux")
    torch.manual_seed(1)
    negative = {f"negative_{k}": torch.randn_like(v) for k, v in tiny.inputs.items() if torch.is_tensor(v)}
    schedule, noise = _schedule(tiny)
    start, latents = _run(tiny, schedule, "latent", true_cfg_scale=3.0, **negative)
    denoiser, _, _ = from_pipeline(tiny.pipe, **_inputs(tiny, true_cfg_scale=3.0, **negative))
    torch.testing.assert_close(sample(denoiser, start[:2], schedule, noise), latents, atol=2e-5, rtol=1e-4)


def test_reference_pipelines() -> None:
    pipe = load("digits-conditional")
    noise = NoiseSchedule.from_config(pipe.scheduler.config)
    schedule = recipe("deis:order=2,grid=lambda", noise, 5)
    labels = [3, 1, 4, 1, 5]
    start = torch.randn(5, 1, 8, 8)
    with swap(pipe, schedule):
        wanted = pipe(labels, guidance_scale=2.0, num_inference_steps=5, latents=start, output_type="pt").images
    denoiser, decode, shape = from_pipeline(pipe, class_labels=labels, guidance_scale=2.0)
    assert shape == (1, 8, 8)
    torch.testing.assert_close(decode(sample(denoiser, start, schedule, noise)), wanted, atol=1e-5, rtol=1e-4)
    plain, _, _ = from_pipeline(load("digits"))
    assert plain(start, torch.tensor(0.5)).shape == start.shape


def test_any_batch_takes_conditions_in_turn() -> None:
    pipe = load("digits-conditional")
    denoiser, _, _ = from_pipeline(pipe, class_labels=[0, 7, 9], guidance_scale=3.0)
    chunked, _, _ = from_pipeline(pipe, class_labels=[0, 7, 9], guidance_scale=3.0, chunk=2)
    x, t = torch.randn(7, 1, 8, 8), torch.tensor(0.6)
    whole = denoiser(x, t)
    torch.testing.assert_close(chunked(x, t), whole, atol=1e-5, rtol=1e-4)
    rows = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    for label in (0, 1, 2):
        own, _, _ = from_pipeline(pipe, class_labels=[0, 7, 9][label : label + 1], guidance_scale=3.0)
        torch.testing.assert_close(own(x[rows == label], t), whole[rows == label], atol=1e-5, rtol=1e-4)


def test_gradients_only_when_wanted() -> None:
    denoiser, _, _ = from_pipeline(load("digits"))
    x = torch.randn(2, 1, 8, 8)
    assert not denoiser(x, torch.tensor(0.5)).requires_grad
    t = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    denoiser(x, t).sum().backward()
    assert t.grad is not None
    assert t.grad.abs() > 0


def test_edm_preconditioning(build: Callable[[str], Any]) -> None:
    """The same U-Net under an EDM scheduler: scaled inputs and the log clock."""
    tiny = build("ddpm")
    tiny.pipe = DDIMPipeline(unet=tiny.pipe.unet, scheduler=DDIMScheduler())
    tiny.pipe.scheduler = EDMEulerScheduler(sigma_max=10.0)
    noise = NoiseSchedule.from_config(tiny.pipe.scheduler.config)
    with pytest.raises(ValueError, match="vp_linear"):
        from_pipeline(tiny.pipe, noise_schedule=NoiseSchedule.vp_linear(), batch_size=2)
    with pytest.raises(ValueError, match="not the state"):
        from_pipeline(tiny.pipe, batch_size=2)  # this pipeline never calls scale_model_input
    assert noise.family == "edm"


def test_refusals(build: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = build("sd")
    with pytest.raises(ValueError, match="num_inference_steps does not belong"):
        from_pipeline(tiny.pipe, **_inputs(tiny), num_inference_steps=3)
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        from_pipeline(tiny.pipe, chunk=0, **_inputs(tiny))
    denoiser, _, _ = from_pipeline(tiny.pipe, **_inputs(tiny))
    with pytest.raises(ValueError, match="shape"):
        denoiser(torch.randn(2, 4, 9, 9), torch.tensor(0.5))
    scheduler, handles = tiny.pipe.scheduler, len(tiny.denoiser._forward_hooks)
    # A guidance that this pipeline was never published with: the rule is not guessed.
    monkeypatch.setattr(StableDiffusionPipeline, "guidance_scale", property(lambda self: 2 * self._guidance_scale))
    with pytest.raises(ValueError, match="not known here"):
        from_pipeline(tiny.pipe, **_inputs(tiny))
    assert tiny.pipe.scheduler is scheduler
    assert len(tiny.denoiser._forward_hooks) == handles


def test_rows_keep_their_conditions() -> None:
    """What is solved in parts, or for some rows alone, is what these rows are in the whole."""
    problem = pipeline_problem(load("digits-conditional"), {"class_labels": [3, 1, 4], "guidance_scale": 2.0})
    whole = problem.endpoint("train", 7, 0, 20)
    parts = replace(whole, batch_size=2)
    schedule = recipe("ddim", problem.noise_schedule, 3)
    torch.testing.assert_close(parts.samples(schedule), whole.samples(schedule), atol=1e-4, rtol=1e-4)
    rows = torch.tensor([4, 0, 5])
    torch.testing.assert_close(whole.solve(schedule, rows), whole.samples(schedule)[rows], atol=1e-4, rtol=1e-4)
    misplaced = sample(problem.denoiser, whole.x_T[rows], schedule, problem.noise_schedule)
    assert (misplaced - whole.samples(schedule)[rows]).abs().max() > 0.1
    with pytest.raises(ValueError, match="3 rows"):
        problem.denoiser.for_rows(rows)(whole.x_T, torch.tensor(0.5))


def test_guidance_scales_take_turns() -> None:
    """Rows 0-2 are guided by one scale, rows 3-5 by the other, and they keep it wherever they are solved."""
    classes = {"class_labels": [3, 1, 4]}
    both = pipeline_problem(load("digits-conditional"), classes, guidance_scales=(1.0, 4.0))
    whole = both.endpoint("train", 7, 0, 20)
    schedule = recipe("ddim", both.noise_schedule, 3)
    drawn = whole.samples(schedule)
    for scale, rows in ((1.0, [0, 1, 2, 6]), (4.0, [3, 4, 5])):
        alone = pipeline_problem(load("digits-conditional"), {**classes, "guidance_scale": scale})
        wanted = sample(alone.denoiser.for_rows(torch.tensor(rows)), whole.x_T[rows], schedule, alone.noise_schedule)
        torch.testing.assert_close(drawn[rows], wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(replace(whole, batch_size=4).samples(schedule), drawn, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="not both"):
        pipeline_problem(load("digits-conditional"), {"guidance_scale": 2.0}, guidance_scales=(1.0, 4.0))

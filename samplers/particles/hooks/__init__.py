"""Feynman-Kac correctors inside unmodified diffusers pipelines."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ..cloud import check_pick
from ..settings import Settings
from .branches import Catcher, networks, restore
from .calling import arrange, install_call, resampling_generator, set_guidance, share_of_noise
from .chunking import install_chunks
from .plans import check_scheduler, plan_of
from .run import Call, Decode, Run, Steps

__all__ = ["Run", "attach"]


@contextmanager
def attach(
    settings: Settings,
    pipe: Any,
    particles: int,
    *,
    pick: str = "all",
    decode: str | Decode | None = None,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
    expand: bool = False,
) -> Iterator[Run]:
    """Correct the pipeline's calls inside the block; afterwards it is exactly what it was.

    Images of a call are particles, K per prompt, prompt-major: prompts are expanded by ``num_images_per_prompt``, class labels
    and batch sizes by repeating. Guidance follows the target, whose branches are "uncond" and "cond"; ``Target.power(1.0)``
    with a reward steers whatever the pipeline samples by itself.

    Args:
        settings: the corrector.
        pipe: a diffusers pipeline, or a modular one with a guider. Its scheduler must draw noise: Euler ancestral, DDPM, DDIM
            with eta, or a `SolverScheduler` with a stochastic schedule; for a reward alone also LCM, TCD and stochastic
            flow-matching Euler.
        particles: K >= 1.
        pick: "all" returns every particle, weights in ``run.log_w``; "sample" and "max" decode and return one per prompt, drawn
            by weight or the heaviest.
        decode: what the reward sees: None for x0-predictions as they are (latents), "image" for the pipeline's own decoding to
            [0, 1], or a function of the latents.
        batch_size: most rows of one network call.
        generator: of resampling; None derives it from the call's generator, or one per prompt from the call's list of them,
            without drawing from these.
        expand: repeat every class label K times, also where labels come in runs of K equal ones.

    Yields:
        The `Run`, which holds weights, log Z and the trace after each call.

    Raises:
        ValueError: what cannot be done exactly, with the reason; from the call where it depends on its arguments.
    """
    _check(settings, pipe, particles, pick, batch_size)
    if decode is not None and decode != "image" and not callable(decode):
        raise ValueError(f"decode is None, 'image' or a function of the latents, got {decode!r}")
    attachment = _Attachment(settings, pipe, Run(particles), pick, decode, generator, expand)
    with ExitStack() as stack:
        attachment.install(stack)
        if batch_size is not None:
            for module in networks(pipe):
                install_chunks(module, batch_size, stack)
        yield attachment.run


class _Attachment:
    """What stands in for a pipeline's call and for its scheduler's methods inside the block."""

    def __init__(
        self,
        settings: Settings,
        pipe: Any,
        run: Run,
        pick: str,
        decode: str | Decode | None,
        generator: torch.Generator | None,
        expand: bool,
    ) -> None:
        self.expand = expand
        self.settings, self.pipe, self.run, self.pick, self.decode = settings, pipe, run, pick, decode
        self.generator, self.scheduler, self.catcher = generator, pipe.scheduler, Catcher(pipe)
        self.exact = settings.target.branches != ("model",)
        window = settings.resample_window
        self.resamples = run.particles > 1 and settings.ess > 0 and window[0] < window[1]
        self.prepared: tuple[Call, float | None] | None = None

    def install(self, stack: ExitStack) -> None:
        self.catcher.install(self.pipe, stack)
        install_call(self.pipe, self.calling, stack)
        for name, wrap in (("step", self.stepping), ("set_timesteps", self.timing)):
            stack.callback(restore(self.scheduler, name))
            setattr(self.scheduler, name, wrap(getattr(self.scheduler, name)))

    def calling(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.pipe.scheduler is not self.scheduler:
                raise ValueError("the pipeline's scheduler was replaced inside the block; replace it before attaching")
            given = arrange(self.pipe, self.run.particles, args, kwargs, expand=self.expand)
            scale = set_guidance(self.pipe, self.settings.target, given) if self.exact else None
            eta = share_of_noise(self.pipe, given)
            check_scheduler(self.scheduler, exact=self.exact, resamples=self.resamples, eta=eta)
            source = self.generator if self.generator is not None else resampling_generator(given, self.run.particles)
            self.prepared = Call(self.run.particles, scale, source, self.pick, decoder(self.pipe, self.decode)), eta
            self.catcher.clear()
            self.run.steps = None
            try:
                return original(**given)
            finally:
                self.prepared = None
                self.catcher.clear()

        return call

    def timing(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def set_timesteps(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if self.prepared is None:  # not from a corrected call, but its schedule can be refused already
                plan_of(self.scheduler, exact=self.exact, resamples=self.resamples, eta=None)
            else:
                call, eta = self.prepared
                plan = plan_of(self.scheduler, exact=self.exact, resamples=self.resamples, eta=eta)
                if self.settings.target.scheduled and not plan.reverse_sde:
                    raise ValueError(
                        "exponents that vary in time need steps with the full noise of the reverse SDE (ancestral sampling, "
                        'DDPM, eta = 1), as in `with samplers.schedulers.swap(pipe, "ddim:eta=1"): ...`'
                    )
                self.run.steps = Steps(self.settings, call, self.catcher, self.scheduler, plan)
            return result

        return set_timesteps

    def stepping(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.run.steps is None:
                raise RuntimeError("the pipeline steps without having set its timesteps; call it, not its parts")
            return self.run.steps.step(original, model_output, timestep, sample, *args, **kwargs)

        return step


def _check(settings: Settings, pipe: Any, particles: int, pick: str, batch_size: int | None) -> None:
    for name, value in (("particles", particles), ("batch_size", batch_size)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
    check_pick(pick)
    target = settings.target
    if not set(target.exponents) <= {"uncond", "cond"} and target.branches != ("model",):
        raise ValueError(
            f"a pipeline has the branches uncond and cond, or model for its own law; the target has "
            f"{', '.join(target.exponents)}. Bind other branches as denoisers and use FeynmanKac.sample"
        )
    if not target.scheduled and abs(sum(target.at(0.0)) - 1.0) > 1e-9:
        raise ValueError(
            f"exponents with sum {sum(target.at(0.0)):g} need another start than N(0, I), which is what pipelines draw: "
            "use FeynmanKac.sample for annealing and products"
        )
    if settings.noise != 1.0:
        raise ValueError(
            f"noise={settings.noise:g}: inside a pipeline the noise is the scheduler's own (ddim:eta=..., sa_solver:...)"
        )
    if target.reward is not None and target.reward.gradient:
        raise ValueError("reward gradients need the denoisers: use FeynmanKac.sample, or gradient=False")
    networks(pipe)
    if getattr(pipe, "scheduler", None) is None:
        raise ValueError(f"{type(pipe).__name__} has no scheduler")


def decoder(pipe: Any, decode: str | Decode | None) -> Decode:
    """From latents to what a reward sees."""
    if decode is None:
        return lambda x0: x0
    if decode != "image":
        assert callable(decode)
        return decode
    vae = getattr(pipe, "vae", None)
    if vae is None:
        return lambda x0: (x0 / 2 + 0.5).clamp(0, 1)
    config = vae.config
    scaling, shift = getattr(config, "scaling_factor", None), getattr(config, "shift_factor", None) or 0.0

    def images(x0: Tensor) -> Tensor:
        if x0.ndim != 4 or scaling is None:
            raise ValueError(
                f"latents of shape {tuple(x0.shape)} are packed or a video: pass decode=, a function of the latents"
            )
        with torch.no_grad():
            picture = vae.decode((x0 / scaling + shift).to(vae.dtype), return_dict=False)[0]
        return (picture.float() / 2 + 0.5).clamp(0, 1)

    return images

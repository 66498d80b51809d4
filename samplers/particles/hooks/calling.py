"""A pipeline's call with its images laid out as particles: prompt-major, K per prompt, guidance as the target says."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from ..resampling import Generators
from ..targets import Target

PER_PROMPT = ("num_images_per_prompt", "num_videos_per_prompt")
SCALES = ("true_cfg_scale", "guidance_scale")  # the first that a pipeline takes is its classifier-free guidance
MIX = 0x5DEECE66D  # odd, so that seeds of particles do not meet those of neighbouring images


def install_call(pipe: Any, wrap: Callable[[Callable[..., Any]], Callable[..., Any]], stack: ExitStack) -> None:
    """Put ``wrap(call)`` in place of the pipeline's ``__call__``, on this instance only; ``stack`` undoes it.

    Python looks ``__call__`` up on the class, so the instance gets a subclass of the same name.
    """
    cls = type(pipe)

    @functools.wraps(cls.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrap(functools.partial(cls.__call__, self))(*args, **kwargs)

    body = {"__call__": call, "__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    pipe.__class__ = type(cls.__name__, (cls,), body)
    stack.callback(lambda: setattr(pipe, "__class__", cls))


def arrange(
    pipe: Any, particles: int, args: tuple[Any, ...], kwargs: dict[str, Any], *, expand: bool = False
) -> dict[str, Any]:
    """The call's keyword arguments with K images per prompt.

    Prompt embeddings are repeated K times. Pipelines without such an argument take class labels or a batch size: labels that
    already come in runs of K equal ones are left alone, others are repeated K times each; a batch size that is a multiple of K
    is left alone.

    Raises:
        ValueError: the caller asked for another number of images per prompt, or passed a list of generators of another length.
    """
    names = _arguments(pipe)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    rows = None
    per_prompt = next((name for name in PER_PROMPT if name in names), None)
    if per_prompt is not None:
        if given.get(per_prompt) not in (None, particles):
            raise ValueError(
                f"{per_prompt}={given[per_prompt]}, but this block runs {particles} particles per prompt; leave it out"
            )
        given[per_prompt] = particles
        if given.get("prompt") is None and torch.is_tensor(given.get("prompt_embeds")):
            given[per_prompt] = 1  # not every pipeline repeats embeddings it is given, so they are repeated here
            for name, value in given.items():
                if torch.is_tensor(value) and ("prompt_embeds" in name or "prompt_attention_mask" in name):
                    given[name] = value.repeat_interleave(particles, 0)
            rows = len(given["prompt_embeds"])
    elif "class_labels" in names and "class_labels" in given:
        labels = given["class_labels"]
        labels = labels.tolist() if torch.is_tensor(labels) else labels
        labels = [labels] if isinstance(labels, int) else list(labels)
        if expand or not laid_out(labels, particles):
            labels = [label for label in labels for _ in range(particles)]
        given["class_labels"], rows = labels, len(labels)
    elif "batch_size" in names:
        size = given.get("batch_size", 1)
        given["batch_size"] = rows = size if size % particles == 0 else size * particles
    generators = given.get("generator")
    if (
        isinstance(generators, list)
        and (rows is None or len(generators) != rows)
        and len(generators) * particles == (rows or len(generators) * particles)
    ):
        given["generator"] = [child for g in generators for child in _children(g, particles)]
    return given


def _arguments(pipe: Any) -> list[str]:
    """Names of the call's arguments; a modular pipeline takes what its blocks take."""
    blocks = getattr(getattr(pipe, "blocks", None), "inputs", ())
    return [*list(inspect.signature(type(pipe).__call__).parameters)[1:], *(p.name for p in blocks if p.name)]


def share_of_noise(pipe: Any, given: dict[str, Any]) -> float | None:
    """The ``eta`` that the scheduler's steps will get: the call's, or a default; None where its steps take none."""
    for parameter in getattr(getattr(pipe, "blocks", None), "inputs", ()):
        if parameter.name == "eta":
            return float(given.get("eta", parameter.default or 0.0))
    for function in (type(pipe).__call__, pipe.scheduler.step):
        parameter = inspect.signature(function).parameters.get("eta")
        if parameter is not None:
            return float(given.get("eta", parameter.default))
    return None


def laid_out(labels: list[int], particles: int) -> bool:
    """Whether labels come in whole runs of K equal ones."""
    runs = [labels[i : i + particles] for i in range(0, len(labels), particles)]
    return all(len(run) == particles and len(set(run)) == 1 for run in runs)


def _children(generator: torch.Generator, particles: int) -> list[torch.Generator]:
    """The generator itself for particle 0, and seeds derived from its own for the others."""
    seed = generator.initial_seed()
    made = (torch.Generator(generator.device).manual_seed((seed + k * MIX) % (1 << 63)) for k in range(1, particles))
    return [generator, *made]


def resampling_generator(given: dict[str, Any], particles: int) -> Generators:
    """A generator for resampling, derived from the call's own without drawing from it; None where it has none.

    Where the call has one generator per image, each group gets its own: what becomes of it does not depend on its batch.
    """
    generators = given.get("generator")
    if isinstance(generators, list):
        return [_derived(first) for first in generators[::particles]]
    return None if generators is None else _derived(generators)


def _derived(generator: torch.Generator) -> torch.Generator:
    return torch.Generator().manual_seed((generator.initial_seed() * 3 + MIX) % (1 << 63))


def set_guidance(pipe: Any, target: Target, given: dict[str, Any]) -> float | None:
    """Make the pipeline run both branches, and return the scale it will mix them with.

    None where the scale is not a call argument (modular pipelines: their guider's is used).

    Raises:
        ValueError: a guidance scale that contradicts the target; guidance rescaling; a network with distilled guidance.
    """
    _refuse_distilled(pipe)
    for name in ("guidance_rescale", "skip_guidance_layers"):
        if given.get(name):
            raise ValueError(f"{name} is not classifier-free guidance any more: no target describes it; leave it out")
    guider = getattr(pipe, "guider", None)
    if guider is not None:
        if getattr(guider, "guidance_rescale", 0.0) or getattr(guider, "use_original_formulation", False):
            raise ValueError("the guider rescales guidance or counts its scale from 0; use a plain ClassifierFreeGuidance")
        return float(guider.guidance_scale)
    names = inspect.signature(type(pipe).__call__).parameters
    scale = next((name for name in SCALES if name in names), None)
    if scale is None:
        raise ValueError(f"{type(pipe).__name__} has no classifier-free guidance; use Target.power(1.0), with a reward")
    wanted = None if target.scheduled else float(target.exponents["cond"])
    usual = wanted is not None and wanted > 1.0
    if given.get(scale) is not None and usual and abs(given[scale] - wanted) > 1e-9:
        raise ValueError(
            f"{scale}={given[scale]:g}, but the target is cfg({wanted:g}); pass {scale}={wanted:g} or leave it out"
        )
    # Where the pipeline cannot mix as the target says, any scale that makes it run both branches will do: the mix is redone.
    given[scale] = wanted if usual else float(given[scale]) if (given.get(scale) or 0.0) > 1.0 else 2.0
    return float(given[scale])


def _refuse_distilled(pipe: Any) -> None:
    for name in ("unet", "transformer"):
        config = getattr(getattr(pipe, name, None), "config", None)
        if config is not None and (config.get("guidance_embeds") or config.get("time_cond_proj_dim")):
            raise ValueError(
                f"the {name} has distilled guidance: its output is no conditional model's score, so guidance of it names no law"
            )

"""What a pipeline does around its network in one step: seen once, with the network's answer replaced by noise.

Pipelines prepare conditioning in their own ways and combine the halves of a guided batch in their own order. Instead of a
copy of that code for every pipeline, one step is run and watched: the network's inputs are kept, and the guidance rule is the
one of the known rules that turns what the network returned into what the scheduler was given. Noise in place of the
answer makes the test sharp: with a real answer, both halves may be nearly equal.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config_reader import read_config
from ..schedulers import swap
from ..strategy import SolverSchedule, StepStrategy
from .network import network_of

STATE_NAMES = ("hidden_states", "sample")
SHARED = ("img_ids", "txt_ids", "image_rotary_emb")  # positions: the same for every row, whatever their first length

Combine = Callable[[list[Tensor]], Tensor]


@dataclass(frozen=True)
class NetworkCall:
    """One forward pass of the watched step.

    Attributes:
        arguments: everything but state and timestep, by name.
        state: (R, *E) what the network was given.
        state_name: its parameter's name.
        timestep: as it was given.
        output: (R, C', ...) the noise that was returned in the answer's place.
    """

    arguments: Mapping[str, Any]
    state: Tensor
    state_name: str
    timestep: Tensor
    output: Tensor


@dataclass(frozen=True)
class WatchedStep:
    """One step of a pipeline.

    Attributes:
        network: the module that is evaluated.
        calls: its forward passes.
        combine: the answers of all calls -> the guided answer (B, *E).
        copies: how often the state is repeated along the batch of a call (2 with guidance).
        latents: (B, *E) the state before the pipeline scaled or repeated it.
        timestep: 0-d, the scheduler's.
    """

    network: torch.nn.Module
    calls: tuple[NetworkCall, ...]
    combine: Combine
    copies: int
    latents: Tensor
    timestep: Tensor


class _StepSeen(Exception):
    """Leaves the pipeline once its first step has been watched."""


def watch_step(pipe: Any, call_kwargs: Mapping[str, Any]) -> WatchedStep:
    """Run the pipeline up to its first scheduler step and report what it did.

    Args:
        pipe: a diffusers pipeline.
        call_kwargs: of its ``__call__``; num_inference_steps and latents are ours.

    Raises:
        ValueError: the pipeline needs more than the known rules of guidance or of inputs can express.
    """
    network, accepted = network_of(pipe), inspect.signature(pipe.__call__).parameters
    generator = {"generator": torch.Generator().manual_seed(0)} if "generator" in accepted else {}
    seen: dict[str, Tensor] = {}
    # One step from a time at which no clock reads 0, so that what the network is told can be compared with it.
    once = SolverSchedule(
        times=(0.75 * read_config(pipe.scheduler.config).noise_schedule().t_max, 0.0), steps=(StepStrategy(),)
    )
    with swap(pipe, once) as scheduler, _watched(network) as calls:

        def step(model_output: Tensor, timestep: Tensor, sample: Tensor, generator: Any = None, **options: Any) -> None:
            seen.update(output=model_output.detach(), timestep=torch.as_tensor(timestep), sample=sample.detach())
            raise _StepSeen

        scheduler.step = step
        try:
            pipe(**{**generator, **call_kwargs}, num_inference_steps=1)
        except _StepSeen:
            pass
        else:
            raise ValueError(f"{type(pipe).__name__} never called its scheduler's step")
        scale = scheduler.scale_model_input(torch.ones((), dtype=torch.float64), seen["timestep"]).item()
    if not calls:
        raise ValueError(f"{type(pipe).__name__} did not evaluate its {type(network).__name__} before the scheduler's step")
    combine, copies = _guidance(type(pipe).__name__, calls, seen, _options(accepted, call_kwargs))
    latents = seen["sample"][: len(calls[0].state) // copies]
    for call in calls:
        expected = torch.cat([latents * scale] * copies)
        if call.state.shape != expected.shape or not _same(call.state, expected.to(call.state)):
            raise ValueError(
                f"{type(pipe).__name__} gives its network {tuple(call.state.shape)}, which is not the state "
                f"{tuple(latents.shape)} repeated {copies} times: this pipeline adds inputs that a denoiser cannot reproduce"
            )
    return WatchedStep(network, tuple(calls), combine, copies, latents, seen["timestep"])


@contextmanager
def _watched(network: torch.nn.Module) -> Iterator[list[NetworkCall]]:
    calls: list[NetworkCall] = []
    signature = inspect.signature(getattr(network, "_orig_mod", network).forward)
    noise = torch.Generator().manual_seed(0)

    def after(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        answer = output if torch.is_tensor(output) else output[0]
        fake = torch.randn(answer.shape, generator=noise).to(answer)
        given = dict(signature.bind(*args, **kwargs).arguments)
        given |= given.pop("kwargs", {})
        name = next((key for key in STATE_NAMES if key in given), None)
        if name is None or "timestep" not in given:
            raise ValueError(f"{type(module).__name__} takes no {' or '.join(STATE_NAMES)} with a timestep")
        state, timestep = given.pop(name), torch.as_tensor(given.pop("timestep"))
        given.pop("return_dict", None)
        calls.append(NetworkCall(given, state.detach(), name, timestep.detach(), fake))
        if torch.is_tensor(output):
            return fake
        return (fake, *output[1:]) if isinstance(output, tuple) else type(output)(sample=fake)

    handle = network.register_forward_hook(after, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def _options(accepted: Mapping[str, inspect.Parameter], given: Mapping[str, Any]) -> dict[str, float]:
    """The numbers that guidance rules read, as given or as the pipeline's defaults."""
    options = {}
    for key in ("guidance_scale", "true_cfg_scale", "guidance_rescale"):
        value = given.get(key, accepted[key].default if key in accepted else None)
        if isinstance(value, int | float):
            options[key] = float(value)
    return options


def _same(a: Tensor, b: Tensor, gain: float = 1.0) -> bool:
    tolerance = 64 * gain * torch.finfo(a.dtype).eps
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1.0))


def _rules(calls: int, options: Mapping[str, float]) -> list[tuple[Combine, int, float]]:
    """Known ways to combine a step's answers, each with the copies of the state in a batch and its guidance scale."""
    rescale = options.get("guidance_rescale", 0.0)
    scales = [options[key] for key in ("guidance_scale", "true_cfg_scale") if key in options]
    sides = [(w, first) for w in scales for first in (0, 1)]  # where "unconditional" is: first in Stable Diffusion, not in DiT
    if calls == 1:
        halves = [(_halves(first, w, rescale), 2, w) for w, first in sides]
        return [(lambda answers: answers[0], 1, 1.0), *halves]
    return [(_passes(first, w, rescale), 1, w) for w, first in sides] if calls == 2 else []


def _guidance(
    name: str, calls: Sequence[NetworkCall], seen: Mapping[str, Tensor], options: Mapping[str, float]
) -> tuple[Combine, int]:
    """The rule that turned the network's answers into the scheduler's model output, and the copies in a batch."""
    channels = seen["sample"].shape[1]

    def own(answer: Tensor) -> Tensor:
        """Without the learned variances."""
        return answer[:, :channels] if answer.shape[1] == 2 * channels else answer

    for rule, copies, w in _rules(len(calls), options):
        if any(len(call.output) % copies for call in calls):
            continue

        def combine(answers: list[Tensor], rule: Combine = rule) -> Tensor:
            return rule([own(answer) for answer in answers])

        expected, made = combine([call.output for call in calls]), own(seen["output"])
        whole = copies == 2 or len(made) == len(expected)  # DiT hands the scheduler both halves
        if whole and _same(made[: len(expected)].to(expected), expected, max(1.0, abs(w))):
            return combine, copies
    settings = ", ".join(f"{key}={value:g}" for key, value in options.items()) or "no guidance options"
    raise ValueError(
        f"{name} combines its network's {len(calls)} call(s) a step in a way that is not known here ({settings}); "
        "known: plain, classifier-free guidance in one batch or in two calls, with or without guidance_rescale"
    )


def _guided(uncond: Tensor, cond: Tensor, w: float, rescale: float) -> Tensor:
    """Classifier-free guidance (arXiv:2207.12598), its spread pulled to the conditional one (arXiv:2305.08891, 3.4)."""
    out = uncond + w * (cond - uncond)
    if rescale:
        dims = tuple(range(1, cond.ndim))
        matched = out * (cond.std(dim=dims, keepdim=True) / out.std(dim=dims, keepdim=True))
        out = rescale * matched + (1 - rescale) * out
    return out


def _halves(first: int, w: float, rescale: float) -> Combine:
    def combine(answers: list[Tensor]) -> Tensor:
        halves = answers[0].chunk(2)
        return _guided(halves[first], halves[1 - first], w, rescale)

    return combine


def _passes(first: int, w: float, rescale: float) -> Combine:
    return lambda answers: _guided(answers[first], answers[1 - first], w, rescale)

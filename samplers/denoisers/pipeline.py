"""A diffusers pipeline as a denoiser: its conditioning bound, its guidance applied, its decoder beside it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..config_reader import ModelConfig, read_config
from ..engine import Denoiser
from ..noise import NoiseSchedule
from ..parametrization import to_x0
from .capture import SHARED, NetworkCall, WatchedStep, watch_step

Decode = Callable[[Tensor], Tensor]


def from_pipeline(
    pipe: DiffusionPipeline, *, noise_schedule: NoiseSchedule | None = None, chunk: int | None = None, **call_kwargs: Any
) -> tuple[Denoiser, Decode, tuple[int, ...]]:
    """The pipeline's network as ``denoiser(x, t) -> x0``, guided as the pipeline would do it, without its loop.

    One step of the pipeline is run to see its conditioning (prompts are encoded once) and its guidance rule, see
    `samplers.denoisers.capture`; what a pipeline changes during its loop (guidance that stops midway) is not reproduced.
    Guidance doubles the batch: an evaluation is one NFE, as everywhere here.

    Args:
        pipe: a pipeline whose state is predicted by a ``unet`` or ``transformer``.
        noise_schedule: the model's; read from the pipeline's scheduler config when None.
        chunk: samples per network call; None takes the batch whole.
        call_kwargs: of the pipeline's call, as ``prompt=``, ``class_labels=``, ``guidance_scale=``, ``height=``. They make B
            conditions; sample i of a batch takes condition i modulo B.

    Returns:
        The denoiser, which follows x's dtype (at least float32) and builds a graph only when gradients with respect to x or t
        are wanted; ``decode(x: (B, *E)) -> (B, C, H, W)`` float32 images in [0, 1]; and the shape (*E) of one sample.

    Raises:
        ValueError: arguments that belong to the sampler, a noise schedule of another family, or a pipeline whose step cannot be
            reproduced (naming what was seen).
    """
    for key in ("num_inference_steps", "timesteps", "sigmas", "latents", "output_type"):
        if key in call_kwargs:
            raise ValueError(f"{key} does not belong to a denoiser: the solver schedule and the caller decide it")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    model = read_config(pipe.scheduler.config)
    noise = model.noise_schedule() if noise_schedule is None else noise_schedule
    if noise.family != model.family:
        raise ValueError(f"the noise schedule is {noise.kind}, the pipeline's model is of the {model.family} family")
    step = watch_step(pipe, call_kwargs)
    clock = tuple(_clock(call, step.timestep) for call in step.calls)
    return PipelineDenoiser(step, model, noise, chunk, clock), _decoder(pipe, call_kwargs, chunk), tuple(step.latents.shape[1:])


@dataclass(frozen=True, eq=False)
class PipelineDenoiser:
    """``(x, t) -> x0`` through a pipeline's network, guidance included.

    Attributes:
        step: the pipeline's conditioning and how it calls and combines.
        model: what the network predicts.
        noise_schedule: of ``t``.
        chunk: samples per network call; all when None.
        clock: per call, the network's timestep over the scheduler's.
        rows: (B,) condition of every row of the state; None gives row i the i-th, in turn.
    """

    step: WatchedStep
    model: ModelConfig
    noise_schedule: NoiseSchedule
    chunk: int | None
    clock: tuple[float, ...]
    rows: Tensor | None = None

    @property
    def conditions(self) -> int:
        """Number of conditions that the rows take in turn."""
        return len(self.step.latents)

    def for_rows(self, rows: Tensor) -> PipelineDenoiser:
        """The denoiser of some rows of a larger state.

        Args:
            rows: (B,) their places in it; they keep the conditions that they have there.
        """
        return replace(self, rows=rows.cpu() % self.conditions)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, *E) states and a 0-d time to the data prediction.

        Raises:
            ValueError: states of another shape, or another number of them than ``rows`` names.
        """
        if x.shape[1:] != self.step.latents.shape[1:]:
            raise ValueError(f"the state has shape (B, {self.step.latents.shape[1:]}), got {tuple(x.shape)}")
        if self.rows is not None and len(self.rows) != len(x):
            raise ValueError(f"this denoiser is that of {len(self.rows)} rows, got {len(x)}")
        t = torch.as_tensor(t, dtype=torch.float64)
        dtype = torch.promote_types(x.dtype, torch.float32)
        alpha, sigma = self.noise_schedule.alpha_sigma(t)
        levels = (alpha, sigma) if t.requires_grad else (alpha.item(), sigma.item())
        scale = 1.0 if self.model.sigma_data is None else (levels[1] ** 2 + self.model.sigma_data**2) ** -0.5
        with torch.set_grad_enabled(torch.is_grad_enabled() and (x.requires_grad or t.requires_grad)):
            index = torch.arange(len(x)) % self.conditions if self.rows is None else self.rows
            outputs = [self._answer(*part, scale) for part in _parts(x.to(dtype), t, index, self.chunk)]
            output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
            return to_x0(output, x.to(dtype), *levels, self.model.prediction_type, self.model.sigma_data)

    def _answer(self, x: Tensor, t: Tensor, rows: Tensor, scale: Any) -> Tensor:
        """The network's answer for some rows, combined as the pipeline does it."""
        step, answers = self.step, []
        timestep = self.noise_schedule.timestep(t)
        for call, ratio in zip(step.calls, self.clock, strict=True):
            state = torch.cat([x * scale] * step.copies).to(call.state.dtype)
            told = (timestep * ratio).to(device=x.device, dtype=call.timestep.dtype)
            told = told if call.timestep.ndim == 0 else told.expand(len(state))
            bound = {key: _rows(value, len(call.state), step.copies, rows, key) for key, value in call.arguments.items()}
            output = step.network(**{call.state_name: state}, timestep=told, **bound, return_dict=False)
            answers.append((output if torch.is_tensor(output) else output[0]).to(x.dtype))
        return step.combine(answers)


def _parts(x: Tensor, t: Tensor, index: Tensor, chunk: int | None) -> list[tuple[Tensor, Tensor, Tensor]]:
    size = chunk or max(len(x), 1)
    return [(x[i : i + size], t, index[i : i + size]) for i in range(0, max(len(x), 1), size)]


def _clock(call: NetworkCall, timestep: Tensor) -> float:
    """The network's timestep over the scheduler's (Flux divides by 1000)."""
    told = call.timestep.double().flatten()
    if call.timestep.ndim > 1 or bool((told != told[0]).any()):
        raise ValueError("the network is told different times within one sample, which a denoiser cannot reproduce")
    return float(f"{(told[0] / timestep.double()).item():.5g}")


def _rows(value: Any, total: int, copies: int, rows: Tensor, name: str) -> Any:
    """A conditioning argument for these rows of its B conditions, in every copy of the batch."""
    if isinstance(value, dict):
        return {key: _rows(item, total, copies, rows, key) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_rows(item, total, copies, rows, name) for item in value)
    if not torch.is_tensor(value) or value.ndim == 0 or len(value) != total or name in SHARED:
        return value
    if torch.equal(rows, torch.arange(total // copies)):
        return value
    return value.unflatten(0, (copies, total // copies))[:, rows.to(value.device)].flatten(0, 1)


def _decoder(pipe: DiffusionPipeline, call_kwargs: dict[str, Any], chunk: int | None) -> Decode:
    """From states to images, as the end of the pipeline's call does it."""
    vae = getattr(pipe, "vae", None)

    def decode(x: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad):
            parts = [one(part) for part in (x.split(chunk) if chunk else (x,))]
            return torch.cat(parts)

    def one(x: Tensor) -> Tensor:
        if vae is not None:
            x = _from_latents(pipe, vae, x, call_kwargs)
        if x.ndim != 4:
            raise ValueError(
                f"{type(pipe).__name__} does not make images of states of shape {tuple(x.shape)}; decode them with it"
            )
        return (x.float() / 2 + 0.5).clamp(0, 1)

    return decode


def _from_latents(pipe: DiffusionPipeline, vae: Any, x: Tensor, call_kwargs: dict[str, Any]) -> Tensor:
    config: Any = vae.config
    if x.ndim == 3 and hasattr(pipe, "_unpack_latents"):
        if len(inspect.signature(pipe._unpack_latents).parameters) != 4:
            raise ValueError(f"{type(pipe).__name__} packs its latents in a way that is not known here; decode them with it")
        size = getattr(pipe, "default_sample_size", 0) * pipe.vae_scale_factor
        height, width = (call_kwargs.get(key) or size for key in ("height", "width"))
        x = pipe._unpack_latents(x, height, width, pipe.vae_scale_factor)
    mean, std = (getattr(config, f"latents_{key}", None) for key in ("mean", "std"))
    if mean is not None and std is not None:
        mean, std = (torch.tensor(value, device=x.device, dtype=x.dtype).view(1, -1, 1, 1) for value in (mean, std))
        x = x * std / config.scaling_factor + mean
    else:
        x = x / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
    upcast = vae.dtype == torch.float16 and getattr(config, "force_upcast", False)
    if not upcast:
        return vae.decode(x.to(vae.dtype), return_dict=False)[0]
    vae.to(torch.float32)  # half precision overflows in this autoencoder
    try:
        return vae.decode(x.float(), return_dict=False)[0]
    finally:
        vae.to(torch.float16)

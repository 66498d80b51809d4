"""The search problem that a pipeline poses: its denoiser, three disjoint sets of noises, and objectives on them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from samplers import NoiseSchedule
from samplers.denoisers import from_pipeline
from samplers.engine import Denoiser

from .converged import of_rows
from .objective import Objective

STRIDE = 1_000_000  # between the seeds of the three sets


@dataclass(frozen=True, eq=False)
class InTurn:
    """Several denoisers as one: so many rows of the state belong to the first, as many to the second, and round again.

    Attributes:
        denoisers: ``(x, t) -> x0`` each.
        block: rows in a row that belong to one.
        rows: (B,) places of the rows in a larger state; None for a state of its own.
    """

    denoisers: tuple[Denoiser, ...]
    block: int
    rows: Tensor | None = None

    def for_rows(self, rows: Tensor) -> InTurn:
        """The denoiser of some rows of a larger state, who keep what they are there."""
        return replace(self, rows=rows.cpu())

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, *E) states and a 0-d time to the data prediction, each row by its own denoiser."""
        rows = torch.arange(len(x)) if self.rows is None else self.rows
        whose = rows // self.block % len(self.denoisers)
        places = [(whose == k).nonzero().flatten() for k in range(len(self.denoisers))]
        answers = [
            of_rows(denoiser, rows[own])(x[own.to(x.device)], t)
            for denoiser, own in zip(self.denoisers, places, strict=True)
            if len(own)
        ]
        return torch.cat(answers)[torch.cat(places).argsort().to(x.device)]


@dataclass(frozen=True)
class Problem:
    """A model, ready to be searched for.

    Attributes:
        denoiser: guided, conditioning bound.
        noise_schedule: the model's.
        shape: (*E) of one sample.
        decode: states -> images in [0, 1].
        model: hash of the network's weights.
        batch_size: samples per network call.
        device: of the states.
    """

    denoiser: Denoiser
    noise_schedule: NoiseSchedule
    shape: tuple[int, ...]
    decode: Any
    model: str
    batch_size: int | None
    device: torch.device

    def noises(self, count: int, seed: int) -> Tensor:
        """(count, *E) starting states; noise i depends on seed + i alone."""
        draws = [torch.randn(self.shape, generator=torch.Generator().manual_seed(seed + i)) for i in range(count)]
        scale = float(self.noise_schedule.sigma(self.noise_schedule.t_max)) if self.noise_schedule.family == "edm" else 1.0
        return (torch.stack(draws) * scale).to(self.device)

    def endpoint(self, split: str, count: int, seed: int, reference_nfe: int, cache: Path | None = None) -> Objective:
        """Endpoint error on one of the disjoint sets "train", "validation" and "test".

        Raises:
            ValueError: unknown split.
        """
        splits = ("train", "validation", "test")
        if split not in splits:
            raise ValueError(f"unknown split {split!r}; known: {', '.join(splits)}")
        x = self.noises(count, seed + STRIDE * splits.index(split))
        return Objective.endpoint(
            self.denoiser,
            self.noise_schedule,
            x,
            reference_nfe,
            batch_size=self.batch_size,
            cache=cache,
            model=self.model,
        )


def pipeline_problem(
    pipe: Any,
    call_kwargs: Mapping[str, Any],
    *,
    guidance_scales: Sequence[float] = (),
    batch_size: int | None = None,
) -> Problem:
    """Bind a pipeline's conditioning; see `samplers.denoisers.from_pipeline`.

    Args:
        pipe: the pipeline.
        call_kwargs: of its call. The noises take the prompts or classes in turn, so an objective averages over them.
        guidance_scales: several scales to be averaged over too: once all conditions have had their turn at one scale, they
            have it at the next. None leaves ``guidance_scale`` to ``call_kwargs``.
        batch_size: samples per network call.

    Raises:
        ValueError: see `from_pipeline`; also a ``guidance_scale`` beside ``guidance_scales``.
    """
    if guidance_scales and "guidance_scale" in call_kwargs:
        raise ValueError("give guidance_scale or guidance_scales, not both")
    calls = [{**call_kwargs, "guidance_scale": scale} for scale in guidance_scales] or [dict(call_kwargs)]
    bound = [from_pipeline(pipe, chunk=batch_size, **call) for call in calls]
    denoiser, decode, shape = bound[0]
    if len(bound) > 1:
        block = denoiser.conditions  # type: ignore[attr-defined]
        denoiser = InTurn(tuple(each for each, _, _ in bound), block)
    network = getattr(pipe, "unet", None) or pipe.transformer
    noise = NoiseSchedule.from_config(pipe.scheduler.config)
    asked = {**call_kwargs, "guidance_scales": tuple(guidance_scales)} if guidance_scales else call_kwargs
    model = f"{weights_hash(network)}-{_described(asked)}"
    return Problem(denoiser, noise, shape, decode, model, None, network.device)


def _described(call_kwargs: Mapping[str, Any]) -> str:
    text = repr(sorted((key, value) for key, value in call_kwargs.items() if not torch.is_tensor(value)))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def weights_hash(network: torch.nn.Module) -> str:
    """Hash of a network's weights: every tensor's name, shape, and a sample of at most 4096 of its values."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        flat = value.detach().flatten()
        picked = flat[:: max(len(flat) // 4096, 1)].to("cpu", torch.float32)
        digest.update(f"{name}{tuple(value.shape)}".encode() + picked.numpy().tobytes())
    return digest.hexdigest()[:16]


def classes_or_prompts(call_kwargs: Mapping[str, Any]) -> Sequence[Any]:
    """What the conditions are, for provenance."""
    return list(call_kwargs.get("prompt", ())) or list(call_kwargs.get("class_labels", ()))

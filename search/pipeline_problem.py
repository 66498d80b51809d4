"""The search problem that a pipeline poses: its denoiser, three disjoint sets of noises, and objectives on them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from samplers import NoiseSchedule
from samplers.denoisers import from_pipeline
from samplers.engine import Denoiser

from .objective import Objective

STRIDE = 1_000_000  # between the seeds of the three sets


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


def pipeline_problem(pipe: Any, call_kwargs: Mapping[str, Any], *, batch_size: int | None = None) -> Problem:
    """Bind a pipeline's conditioning; see `samplers.denoisers.from_pipeline`.

    The noises take the conditions in turn, so several prompts are averaged over by one objective; average over guidance scales
    with `Objective.mean`.
    """
    denoiser, decode, shape = from_pipeline(pipe, chunk=batch_size, **call_kwargs)
    network = getattr(pipe, "unet", None) or pipe.transformer
    noise = NoiseSchedule.from_config(pipe.scheduler.config)
    described = f"{weights_hash(network)}-{_described(call_kwargs)}"
    return Problem(denoiser, noise, shape, decode, described, None, network.device)


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

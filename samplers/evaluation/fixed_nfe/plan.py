"""What a run at fixed NFE will do: cells of model, sampler and NFE, each with a digest of all that decides its images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ...schedulers import SolverScheduler
from ..models import Conditioning, DiffusionPipeline, SchedulerMixin, network_of, use_sampler

FORMAT = 1
SHARD = 500


@dataclass(frozen=True)
class Model:
    """A loaded pipeline, its name, and the hash of its denoiser's weights."""

    name: str
    pipe: DiffusionPipeline
    dtype: str = "float32"
    weights: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        """Hash the denoiser."""
        if not self.weights:
            object.__setattr__(self, "weights", weights_hash(network_of(self.pipe)))


@dataclass(frozen=True)
class Cell:
    """One sampler at one NFE with one model.

    Attributes:
        model: name of the model.
        sampler: recipe text, path or name of a schedule, or "diffusers:ClassName[:option=value,...]".
        nfe: asked for, evaluations per image.
        settings: all that decides the images but their seeds.
    """

    model: str
    sampler: str
    nfe: int
    settings: dict[str, Any] = field(hash=False)

    @property
    def digest(self) -> str:
        """Hash of the settings: names the cell's shards."""
        return canonical_hash(self.settings)[:24]


def plan_cells(
    models: Sequence[Model], samplers: Sequence[str], nfes: Sequence[int], conditioning: Conditioning, protocol: str
) -> list[Cell]:
    """All cells, each schedule built once, so that what cannot run is known before anything runs.

    Args:
        models: loaded.
        samplers: each once.
        nfes: numbers of evaluations, each once.
        conditioning: what to generate.
        protocol: id of the features' protocol.

    Raises:
        ValueError: nothing to do, something named twice, or a schedule or conditioning that does not fit a model.
    """
    names = [model.name for model in models]
    for what, values in (("model", names), ("sampler", samplers), ("NFE", nfes)):
        if not values:
            raise ValueError(f"no {what} to evaluate")
        twice = sorted({str(value) for value in values if list(values).count(value) > 1})
        if twice:
            raise ValueError(f"{what} named twice: {', '.join(twice)}")
    if min(nfes) < 1:
        raise ValueError(f"NFE must be at least 1, not {min(nfes)}")
    cells = []
    for model in models:
        conditioning.check(model.pipe)
        for sampler in samplers:
            for nfe in nfes:
                with use_sampler(model.pipe, sampler) as scheduler:
                    scheduler.set_timesteps(nfe, **({"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}))
                    settings = {
                        "format": FORMAT,
                        "model": model.name,
                        "weights": model.weights,
                        "dtype": model.dtype,
                        "schedule": schedule_of(scheduler, nfe),
                        "conditioning": asdict(conditioning),
                        "protocol": protocol,
                    }
                cells.append(Cell(model.name, sampler, nfe, json.loads(json.dumps(settings, default=str))))
    return cells


def schedule_of(scheduler: SchedulerMixin, nfe: int) -> dict[str, Any]:
    """What decides the steps: our schedule's dict, or the class and configuration of diffusers' own."""
    if isinstance(scheduler, SolverScheduler) and scheduler.solver_schedule is not None:
        return {"schedule": scheduler.solver_schedule.to_dict(), "config": _plain(scheduler)}
    return {"class": type(scheduler).__name__, "steps": nfe, "config": _plain(scheduler)}


def nominal_nfe(scheduler: SchedulerMixin, nfe: int) -> int:
    """Evaluations that the schedule says it makes."""
    if isinstance(scheduler, SolverScheduler) and scheduler.solver_schedule is not None:
        return scheduler.solver_schedule.nfe
    return nfe


def shards_of(first: int, last: int, size: int = SHARD) -> Iterator[range]:
    """Ranges of seeds that together are first..last - 1, cut at multiples of ``size``: a longer run reuses them."""
    while first < last:
        end = min(last, (first // size + 1) * size)
        yield range(first, end)
        first = end


def canonical_hash(value: Any) -> str:
    """SHA-256 of the JSON text with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def weights_hash(module: torch.nn.Module) -> str:
    """SHA-256 of a network's weights, names and dtypes included."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _plain(scheduler: SchedulerMixin) -> dict[str, Any]:
    """The configuration without versions and file names."""
    return {key: value for key, value in sorted(scheduler.config.items()) if not key.startswith("_")}

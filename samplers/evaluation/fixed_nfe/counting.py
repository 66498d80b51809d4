"""Network evaluations as they happen: counted by a hook, guidance passes apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ..models import DiffusionPipeline, network_of


@dataclass
class Calls:
    """Forward passes of the denoiser in one run of a pipeline."""

    rows: list[int] = field(default_factory=list)
    times: list[Tensor] = field(default_factory=list)

    def count(self, images: int, steps: int) -> tuple[int, float]:
        """Evaluations per image, and network passes per evaluation.

        Guidance evaluates the network with and without its condition at the same time: as one doubled batch, or as
        consecutive calls. Calls are taken together only if that leaves as many evaluations as the schedule has.

        Args:
            images: made in the run.
            steps: evaluations that the schedule says it makes.
        """
        calls = len(self.rows)
        if calls > steps and len(self.times) == calls:
            runs = [len(list(run)) for _, run in groupby(float(time.flatten()[0]) for time in self.times)]
            if len(runs) == steps and len(set(runs)) == 1:
                calls = steps
        return calls, sum(self.rows) / (images * calls) if calls else 0.0


@contextmanager
def record_calls(pipe: DiffusionPipeline) -> Iterator[Calls]:
    """Record the denoiser's calls inside the block; nothing is read from the device until they are counted."""
    record = Calls()

    def before(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if torch.is_tensor(value)]
        record.rows.append(len(tensors[0]) if tensors else 0)
        time = kwargs.get("timestep", args[1] if len(args) > 1 else None)
        if time is not None:
            record.times.append(torch.as_tensor(time))

    handle = network_of(pipe).register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield record
    finally:
        handle.remove()

"""Few-step samplers against a converged solution from the same noise: does the picture stay the same?"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..schedulers import swap
from .models import Conditioning, DiffusionPipeline, count_calls, generate, in_tree

REFERENCE = "dpmpp:order=3,taylor=true,grid=lambda"


@dataclass(frozen=True)
class Comparison:
    """One sampler at one NFE.

    Attributes:
        sampler: recipe text, schedule name, or "diffusers ClassName".
        nfe: network evaluations per image, counted by a hook (a doubled guidance batch is one).
        rmse: root mean squared difference to the converged images, in units of the [-1, 1] pixel range.
        seconds: wall time of all images.
        images: (B, C, H, W) in [0, 1].
    """

    sampler: str
    nfe: int
    rmse: float
    seconds: float
    images: Tensor

    def row(self) -> dict[str, Any]:
        """Everything but the images, JSON-native."""
        return {"sampler": self.sampler, "nfe": self.nfe, "rmse": self.rmse, "seconds": self.seconds}


def converged(pipe: DiffusionPipeline, conditioning: Conditioning, images: range, *, steps: int = 200, seed: int = 0) -> Tensor:
    """The probability-flow solution for these noises, (B, C, H, W) in [0, 1]: a third-order solver at many steps."""
    with swap(pipe, REFERENCE):
        return generate(pipe, conditioning, images, steps=steps, seed=seed)


def compare(
    pipe: DiffusionPipeline,
    conditioning: Conditioning,
    samplers: Sequence[str | Mapping[str, Any]],
    nfes: Sequence[int],
    *,
    images: range,
    reference: Tensor,
    seed: int = 0,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Comparison]:
    """Sample the same noises with every sampler at every NFE.

    Args:
        pipe: the pipeline.
        conditioning: what to generate.
        samplers: recipe text or schedule names; ``{"class": ..., "name": ..., "options": {...}}`` for diffusers' own; or
            ``{"name": ..., "schedules": {"5": schedule, ...}}`` for fixed schedules by their NFE, which sit out the others.
        nfes: numbers of network evaluations.
        images: image numbers, as in `generate`.
        reference: the converged images.
        seed: of the first image.
        progress: called with what is about to run.
    """
    results = []
    for sampler in samplers:
        for nfe in nfes:
            name = _name(sampler)
            progress(f"{name}, {nfe} evaluations")
            if isinstance(sampler, str):
                scheduler = swap(pipe, sampler)
            elif "schedules" in sampler:
                if str(nfe) not in sampler["schedules"]:
                    continue
                scheduler = swap(pipe, sampler["schedules"][str(nfe)])
            else:
                scheduler = in_tree(pipe, sampler["class"], sampler.get("options", {}))
            with scheduler, count_calls(pipe) as count:
                start = time.perf_counter()
                out = generate(pipe, conditioning, images, steps=nfe, seed=seed)
                seconds = time.perf_counter() - start
            rmse = 2 * (out - reference).square().mean().sqrt().item()
            results.append(Comparison(name, count.calls, rmse, seconds, out))
    return results


def _name(sampler: str | Mapping[str, Any]) -> str:
    if isinstance(sampler, str):
        return sampler
    return str(sampler["name"]) if "schedules" in sampler else f"diffusers {sampler.get('name', sampler['class'])}"

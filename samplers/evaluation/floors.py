"""The real-vs-real floor: what the distance is when nothing is generated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .extrapolation import frechet_infinity
from .features import FeatureProtocol
from .frechet import FrechetReference
from .references import Reference


@dataclass(frozen=True)
class Floor:
    """The distance between real images.

    Attributes:
        value: at ``n`` images.
        n: images on the side that stands for the generated ones.
        method: how it was found.
    """

    value: float
    n: int
    method: str


def frechet_floor(reference: Reference, protocol: FeatureProtocol, n: int, *, generator: torch.Generator) -> Floor | None:
    """Frechet distance of real images to the reference, as if n of them had been generated.

    With n held-out images it is measured; with fewer, the line in 1/N through subsets of them gives it at n; without any,
    one half of the reference stands against the other, which overstates it. None when there are only moments.

    Args:
        reference: with features.
        protocol: of the distance.
        n: generated images.
        generator: draws subsets.
    """
    if reference.held_out is not None:
        return _held_out(reference.held_out, reference.frechet(protocol), n, generator)
    if reference.features is None or len(reference.features) < 8:
        return None
    order = torch.randperm(len(reference.features), generator=generator)
    half = len(order) // 2
    first, second = reference.features[order[:half]], reference.features[order[half:]]
    side = FrechetReference.from_features(first, unit_variance=protocol.unit_variance)
    chosen = second[: min(n, len(second))]
    method = f"halves of the reference, {half} against {len(chosen)} images"
    return Floor(side.distance_to_features(chosen), len(chosen), method)


def _held_out(held_out: Tensor, side: FrechetReference, n: int, generator: torch.Generator) -> Floor:
    m = len(held_out)
    if m >= n:
        chosen = held_out[torch.randperm(m, generator=generator)[:n]]
        return Floor(side.distance_to_features(chosen), n, f"{n} held-out real images")
    if m < 60:
        return Floor(side.distance_to_features(held_out), m, f"all {m} held-out real images; fewer than generated ones")
    line = frechet_infinity(held_out, side, generator=generator)
    return Floor(max(line.at(n), 0.0), n, f"{m} held-out real images, extrapolated from them to {n} by a line in 1/N")

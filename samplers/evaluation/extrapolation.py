"""Frechet distance at infinitely many images, by a straight line in 1/N."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from .frechet import FrechetReference


class Extrapolation(NamedTuple):
    """A value at N = infinity with its 95% interval, and the points of the line."""

    value: float
    low: float
    high: float
    sizes: tuple[int, ...]
    values: tuple[float, ...]

    def at(self, n: float) -> float:
        """The line at n images."""
        fit = stats.linregress([1 / size for size in self.sizes], self.values)
        return float(fit.intercept + fit.slope / n)


def frechet_infinity(
    features: Tensor, reference: FrechetReference, *, points: int = 15, smallest: int | None = None, generator: torch.Generator
) -> Extrapolation:
    """Frechet distance without the bias of a finite number of generated images (Chong & Forsyth 2020, arXiv:1911.07023).

    The bias is close to proportional to 1/N: distances of random subsets of evenly spaced sizes give a line, and its value
    at 1/N = 0 is the estimate. The interval is that of the fit; as the subsets share images it is rather too narrow.

    Args:
        features: (N, D).
        reference: the other side.
        points: sizes on the line.
        smallest: size; a third of N by default.
        generator: draws the subsets.

    Raises:
        ValueError: fewer than three points, or too few images.
    """
    n = len(features)
    smallest = max(2, n // 3) if smallest is None else smallest
    if points < 3 or not 2 <= smallest <= n - points:
        raise ValueError(f"a line needs at least 3 points and sizes between 2 and {n}, not {points} from {smallest}")
    sizes = tuple(int(size) for size in np.linspace(smallest, n, points).round())
    values = []
    for size in sizes:
        chosen = torch.randperm(n, generator=generator)[:size].to(features.device)
        values.append(reference.distance_to_features(features[chosen]))
    fit = stats.linregress([1 / size for size in sizes], values)
    half = float(stats.t.ppf(0.975, points - 2) * fit.intercept_stderr)
    return Extrapolation(float(fit.intercept), float(fit.intercept) - half, float(fit.intercept) + half, sizes, tuple(values))

"""Distances between samples without features of a network: sliced Wasserstein and energy distance."""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels import pair


def sliced_wasserstein(x: Tensor, y: Tensor, *, projections: int = 256, generator: torch.Generator, block: int = 64) -> float:
    """Sliced 2-Wasserstein distance (Bonneel et al. 2015): root mean square of W2 over random directions.

    Each one-dimensional W2 is exact, also for samples of different sizes.

    Args:
        x: (n, D) or (n, *E) samples.
        y: (m, D) or (m, *E) samples.
        projections: random directions.
        generator: draws them; give the same one to numbers that are compared.
        block: directions at a time.

    Raises:
        ValueError: shapes that do not fit, or values that are not finite.
    """
    x, y = pair(x.flatten(1), y.flatten(1))
    if projections < 1:
        raise ValueError(f"projections must be at least 1, not {projections}")
    directions = torch.randn(x.shape[1], projections, generator=generator, dtype=torch.float64).to(x.device)
    directions = directions / directions.norm(dim=0)
    first, second, weights = _couple(len(x), len(y), x.device)
    total = x.new_zeros(())
    for part in directions.split(block, dim=1):
        a, b = (x @ part).sort(0).values, (y @ part).sort(0).values
        total = total + (weights @ (a[first] - b[second]).square()).sum()
    return (total / projections).sqrt().item()


def energy_distance(x: Tensor, y: Tensor, *, block: int = 2048) -> float:
    r"""Squared energy distance $2E|X-Y| - E|X-X'| - E|Y-Y'|$ (Szekely & Rizzo 2013), unbiased.

    Args:
        x: (n, D) or (n, *E) samples.
        y: (m, D) or (m, *E) samples.
        block: rows of one block of distances.

    Returns:
        The estimate; it can be negative when the laws are equal.

    Raises:
        ValueError: shapes that do not fit, or values that are not finite.
    """
    x, y = pair(x.flatten(1), y.flatten(1))
    n, m = len(x), len(y)
    between = torch.stack([torch.cdist(a, b).sum() for a in x.split(block) for b in y.split(block)]).sum()
    within_x = torch.stack([torch.cdist(a, b).sum() for a in x.split(block) for b in x.split(block)]).sum()
    within_y = torch.stack([torch.cdist(a, b).sum() for a in y.split(block) for b in y.split(block)]).sum()
    return (2 * between / (n * m) - within_x / (n * (n - 1)) - within_y / (m * (m - 1))).item()


def _couple(n: int, m: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The optimal coupling of n and m sorted points of equal weights: pairs of indices and the weight of each pair.

    The quantile functions are steps at i/n and j/m; in units of 1/(n m) all breaks are whole numbers.
    """
    breaks = torch.cat([torch.arange(1, n + 1, device=device) * m, torch.arange(1, m + 1, device=device) * n]).unique()
    starts = torch.cat([breaks.new_zeros(1), breaks[:-1]])
    weights = (breaks - starts).to(torch.float64) / (n * m)
    return starts // m, starts // n, weights

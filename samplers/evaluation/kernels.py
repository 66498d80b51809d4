"""Maximum mean discrepancies: KID, its subset form, and CMMD."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Kernel = Callable[[Tensor, Tensor], Tensor]


def kernel_distance(
    features: Tensor,
    reference: Tensor,
    *,
    degree: int = 3,
    gamma: float | None = None,
    coef: float = 1.0,
    block: int = 2048,
) -> float:
    r"""Kernel distance: the unbiased squared MMD with $k(x, y) = (\gamma\, x^T y + c)^3$ over all pairs.

    This is KID (Binkowski et al. 2018, arXiv:1801.01401, Section 4) without its random subsets: deterministic, and with
    less variance. It can be negative. Memory is O(block^2) whatever the number of vectors.

    Args:
        features: (n, D), n at least 2.
        reference: (m, D), m at least 2.
        degree: of the polynomial.
        gamma: 1/D by default.
        coef: the constant.
        block: rows of one block of the kernel matrix.

    Raises:
        ValueError: shapes that do not fit, or values that are not finite.
    """
    x, y = pair(features, reference)
    scale = 1 / x.shape[1] if gamma is None else gamma
    return _mmd(x, y, lambda a, b: (scale * (a @ b.mT) + coef) ** degree, block, unbiased=True)


def kernel_distance_subsets(
    features: Tensor,
    reference: Tensor,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    generator: torch.Generator,
    degree: int = 3,
    gamma: float | None = None,
    coef: float = 1.0,
) -> tuple[float, float]:
    """KID as it is usually published: mean and standard deviation over random subsets.

    Args:
        features: (n, D).
        reference: (m, D).
        subsets: their number.
        subset_size: vectors of each side in one subset, drawn without repetition.
        generator: draws the subsets.
        degree: as in `kernel_distance`.
        gamma: as in `kernel_distance`.
        coef: as in `kernel_distance`.

    Raises:
        ValueError: fewer vectors than ``subset_size``, or as in `kernel_distance`.
    """
    x, y = pair(features, reference)
    if subset_size > min(len(x), len(y)):
        raise ValueError(f"subset_size {subset_size} is more than the {min(len(x), len(y))} vectors there are")
    values = []
    for _ in range(subsets):
        a = torch.randperm(len(x), generator=generator)[:subset_size].to(x.device)
        b = torch.randperm(len(y), generator=generator)[:subset_size].to(y.device)
        values.append(kernel_distance(x[a], y[b], degree=degree, gamma=gamma, coef=coef))
    result = torch.tensor(values, dtype=torch.float64)
    return result.mean().item(), result.std(correction=0).item()


def gaussian_kernel_distance(
    features: Tensor, reference: Tensor, *, sigma: float = 10.0, scale: float = 1000.0, block: int = 2048
) -> float:
    r"""``scale`` times the squared MMD with $k(x, y) = \exp(-|x-y|^2 / 2\sigma^2)$, diagonal terms kept.

    On CLIP embeddings this is CMMD (Jayasumana et al. 2024, arXiv:2401.09603), whose published values use this estimator
    and these constants.

    Args:
        features: (n, D).
        reference: (m, D).
        sigma: bandwidth.
        scale: factor of the result.
        block: rows of one block of the kernel matrix.

    Raises:
        ValueError: as in `kernel_distance`.
    """
    x, y = pair(features, reference)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        squared = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * (a @ b.mT)
        return torch.exp(-squared.clamp(min=0) / (2 * sigma**2))

    return scale * _mmd(x, y, kernel, block, unbiased=False)


def pair(features: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides in float64 on one device.

    Raises:
        ValueError: shapes that do not fit, or values that are not finite.
    """
    x, y = torch.as_tensor(features).to(torch.float64), torch.as_tensor(reference).to(torch.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(f"features must be (n, D) and (m, D), n and m at least 2; not {tuple(x.shape)} and {tuple(y.shape)}")
    if not bool(x.isfinite().all() & y.isfinite().all()):
        raise ValueError("features are not finite")
    return x, y.to(x.device)


def _mmd(x: Tensor, y: Tensor, kernel: Kernel, block: int, *, unbiased: bool) -> float:
    n, m = len(x), len(y)
    xx, yy = _within(x, kernel, block, diagonal=not unbiased), _within(y, kernel, block, diagonal=not unbiased)
    xy = torch.stack([kernel(a, b).sum() for a in x.split(block) for b in y.split(block)]).sum()
    if unbiased:
        return (xx / (n * (n - 1)) + yy / (m * (m - 1)) - 2 * xy / (n * m)).item()
    return (xx / n**2 + yy / m**2 - 2 * xy / (n * m)).item()


def _within(x: Tensor, kernel: Kernel, block: int, *, diagonal: bool) -> Tensor:
    """Sum of the kernel over all pairs of one side; each block above the diagonal counts twice."""
    blocks = x.split(block)
    total = x.new_zeros(())
    for i, a in enumerate(blocks):
        square = kernel(a, a)
        total = total + square.sum() - (0 if diagonal else square.diagonal().sum())
        for b in blocks[i + 1 :]:
            total = total + 2 * kernel(a, b).sum()
    return total

"""Products that are known to be symmetric: half of the work is left out."""

from __future__ import annotations

from torch import Tensor

BLOCK = 256


def add_lower_(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Add the lower triangle of a^T b to ``out`` in place; what is above the diagonal blocks stays as it was.

    Args:
        out: (D, D).
        a: (n, D).
        b: (n, D) with a^T b symmetric.
    """
    dim = len(out)
    for start in range(0, dim, BLOCK):
        stop = min(start + BLOCK, dim)
        out[start:stop, :stop].addmm_(a[:, start:stop].mT, b[:, :stop])
    return out


def full(lower: Tensor) -> Tensor:
    """The symmetric matrix with this lower triangle."""
    return lower.tril() + lower.tril(-1).mT

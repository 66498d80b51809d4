"""Precision, recall, density and coverage: fidelity and variety apart, from nearest neighbours."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .kernels import pair


class PrecisionRecall(NamedTuple):
    """Precision (how many generated images look real) and recall (how much of the real variety is generated)."""

    precision: float
    recall: float


class PRDC(NamedTuple):
    """Precision and recall with density and coverage, their forms that outliers do not break."""

    precision: float
    recall: float
    density: float
    coverage: float


def precision_recall(generated: Tensor, reference: Tensor, *, k: int = 3, block: int = 1024) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al. 2019, arXiv:1904.06991, equation 1).

    Precision is the share of generated vectors inside a ball around a real vector that reaches to its k-th real
    neighbour; recall is the same with the sides exchanged.

    Args:
        generated: (n, D) features of generated images.
        reference: (m, D) features of real images.
        k: neighbours; a vector is not its own neighbour.
        block: rows of one block of distances; memory is O(block (n + m)).

    Raises:
        ValueError: shapes that do not fit, values that are not finite, or k that is not below both n and m.
    """
    result = prdc(generated, reference, k=k, block=block)
    return PrecisionRecall(result.precision, result.recall)


def prdc(generated: Tensor, reference: Tensor, *, k: int = 3, block: int = 1024) -> PRDC:
    """Precision, recall, and density and coverage (Naeem et al. 2020, arXiv:2002.09797, equations 4 and 5).

    Arguments and errors as in `precision_recall`. Density and coverage are usually published with k = 5.
    """
    fake, real = pair(generated, reference)
    if not 1 <= k < min(len(fake), len(real)):
        raise ValueError(f"k must be from 1 to {min(len(fake), len(real)) - 1} for so many vectors, not {k}")
    real_radius, fake_radius = _radii(real, k, block), _radii(fake, k, block)
    inside_real = torch.zeros(len(fake), dtype=torch.int64, device=fake.device)  # real balls around each generated vector
    recalled, covered = 0, 0
    for rows in torch.arange(len(real), device=real.device).split(block):
        distance = torch.cdist(real[rows], fake)
        inside = distance <= real_radius[rows, None]
        inside_real += inside.sum(0)
        covered = covered + inside.any(1).sum()
        recalled = recalled + (distance <= fake_radius).any(1).sum()
    return PRDC(
        precision=(inside_real > 0).double().mean().item(),
        recall=float(recalled) / len(real),
        density=inside_real.double().mean().item() / k,
        coverage=float(covered) / len(real),
    )


def _radii(x: Tensor, k: int, block: int) -> Tensor:
    """Distance of each vector to its k-th neighbour, (n,)."""
    radii = []
    for start in range(0, len(x), block):
        distance = torch.cdist(x[start : start + block], x)
        rows = torch.arange(len(distance), device=x.device)
        distance[rows, rows + start] = torch.inf  # itself; a duplicate is a neighbour at distance zero
        radii.append(distance.kthvalue(k, dim=1).values)
    return torch.cat(radii)

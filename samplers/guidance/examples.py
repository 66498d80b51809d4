"""Kinds of rarity that a person points at: find what is like some examples, and label what was marked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def alike(features: Tensor, examples: Sequence[int] | Tensor) -> Tensor:
    """How much every sample is like the examples: the cosine of its features with the examples' mean direction.

    Args:
        features: (N, F), whitened (`Whitening`), so that what all samples share does not count.
        examples: rows of a kind; ten do, fifty do better.

    Returns:
        (N,) in -1..1, the examples' own among them.

    Raises:
        ValueError: no examples, or rows that do not exist.
    """
    if features.ndim != 2:
        raise ValueError(f"features must be (N, F), got {tuple(features.shape)}")
    rows = _rows(examples, len(features), "the examples")
    directions = F.normalize(features, dim=1)
    return directions @ F.normalize(directions[rows].mean(0), dim=0)


def marked_kinds(count: int, kinds: Sequence[Sequence[int] | Tensor]) -> Tensor:
    """Labels for a classifier of two bins whose rarest is split into the marked kinds.

        MinorityClassifier(shape, 2, parts=len(kinds)).fit(data, marked_kinds(len(data), kinds), noise_schedule,
                                                           FitSettings(balanced=True))

    Samples of a kind that nobody marked count as common; while they are few, guidance hardly feels it.

    Args:
        count: N, samples in all.
        kinds: rows of every kind.

    Returns:
        (N,) int64: 0 for what was not marked, 1 + k for kind k.

    Raises:
        ValueError: no kinds, a kind without rows, rows that do not exist, or one that is in two kinds.
    """
    if len(kinds) == 0:
        raise ValueError("no kinds were given: mark the samples of at least one")
    labels = torch.zeros(count, dtype=torch.int64)
    for k, kind in enumerate(kinds):
        rows = _rows(kind, count, f"kind {k}")
        taken = rows[labels[rows] != 0]
        if len(taken):
            raise ValueError(f"sample {int(taken[0])} is in kind {int(labels[taken[0]]) - 1} and in kind {k}: mark it once")
        labels[rows] = 1 + k
    if not bool((labels == 0).any()):
        raise ValueError("every sample was marked: nothing is left to tell the kinds from")
    return labels


def _rows(given: Sequence[int] | Tensor, count: int, name: str) -> Tensor:
    rows = torch.as_tensor(given, dtype=torch.int64).cpu().reshape(-1)
    if len(rows) == 0:
        raise ValueError(f"{name} must name at least one sample, got none")
    wrong = rows[(rows < 0) | (rows >= count)]
    if len(wrong):
        raise ValueError(f"{name}: there is no sample {int(wrong[0])}; they are numbered 0..{count - 1}")
    return rows

"""From scores to classes: bins of equal counts, and a split of the rarest bin into kinds of rarity."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor


def equal_count_bins(scores: Tensor, bins: int = 10) -> Tensor:
    """Cut scores into bins of equal counts (they differ by at most one); the last bin is the rarest.

    Args:
        scores: (N,) finite, higher is rarer; ties keep their order.
        bins: L, at most N.

    Returns:
        (N,) int64 in 0..L-1.

    Raises:
        ValueError: scores that are not finite or not (N,), or a number of bins outside 2..N.
    """
    if scores.ndim != 1 or not bool(torch.isfinite(scores).all()):
        raise ValueError(f"scores must be finite and of shape (N,), got {tuple(scores.shape)}")
    if not 2 <= bins <= len(scores):
        raise ValueError(f"bins must lie in 2..{len(scores)} for {len(scores)} scores, got {bins}")
    rank = torch.empty(len(scores), dtype=torch.int64)
    rank[scores.cpu().argsort(stable=True)] = torch.arange(len(scores))
    return rank * bins // len(scores)


def bins_within(scores: Tensor, class_labels: Tensor, bins: int = 10) -> Tensor:
    """`equal_count_bins` within every class: rare for its class.

    Args:
        scores: (N,).
        class_labels: (N,) integers.
        bins: L.
    """
    if class_labels.shape != scores.shape:
        raise ValueError(f"{tuple(scores.shape)} scores and {tuple(class_labels.shape)} class labels")
    out = torch.empty(len(scores), dtype=torch.int64)
    for label in class_labels.unique():
        rows = class_labels == label
        out[rows] = equal_count_bins(scores[rows], bins)
    return out


def split_rarest(labels: Tensor, residuals: Tensor, parts: int = 8, *, seed: int = 0) -> Tensor:
    """Split the rarest bin into kinds of rarity, so that guidance can reach each of them and does not collapse onto one.

    The samples of the last bin are clustered by what one-step reconstruction loses of them (`MinorityScorer.residuals`), each
    residual scaled to length one: samples that are rare for the same reason lose the same thing.

    Args:
        labels: (N,) bins 0..L-1.
        residuals: (M, *E) of the M samples in bin L-1, in their order in ``labels``.
        parts: clusters K.
        seed: of k-means.

    Returns:
        (N,) int64: bins 0..L-2 as they were, parts L-1..L-2+K.

    Raises:
        ValueError: shapes that do not fit, or fewer samples than parts.
    """
    rows = labels == labels.max()
    if len(residuals) != int(rows.sum()):
        raise ValueError(f"the rarest bin has {int(rows.sum())} samples, residuals were given for {len(residuals)}")
    if not 1 <= parts <= len(residuals):
        raise ValueError(f"parts must lie in 1..{len(residuals)}, got {parts}")
    flat = residuals.flatten(1).double().cpu()
    flat = flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-12)
    clusters = KMeans(parts, n_init=10, random_state=seed).fit_predict(flat.numpy())
    out = labels.clone()
    out[rows] = int(labels.max()) + torch.from_numpy(clusters.astype(np.int64))
    return out

"""How rare generated images are against real ones, and how close they come to the real rare ones.

Rarity and damage look alike: distances grow for both. So `rarity_scores` leaves out what lies off the data's manifold and says
how much that is, and `rare_subset_report` compares with the real rare images, not with all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.neighbors import LocalOutlierFactor, NearestNeighbors
from torch import Tensor

from .frechet import frechet_distance
from .moments import FeatureMoments
from .neighbours import precision_recall


def _pair(generated: Tensor, reference: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    for name, x in (("generated", generated), ("reference", reference)):
        if x.ndim != 2 or not bool(torch.isfinite(x).all()):
            raise ValueError(f"{name} must be finite features (n, D), got shape {tuple(x.shape)}")
    if generated.shape[1] != reference.shape[1]:
        raise ValueError(f"generated features have {generated.shape[1]} values, reference features {reference.shape[1]}")
    if not 1 <= k < len(reference):
        raise ValueError(f"k must lie in 1..{len(reference) - 1} for {len(reference)} reference vectors, got {k}")
    return generated.double().cpu().numpy(), reference.double().cpu().numpy()


def average_knn_distance(generated: Tensor, reference: Tensor, *, k: int = 5) -> Tensor:
    """Mean Euclidean distance to the k nearest reference vectors, (n,) float64; higher is rarer, or worse.

    Args:
        generated: (n, D) features.
        reference: (m, D) features of real images.
        k: neighbours, below m.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, or k out of range.
    """
    fake, real = _pair(generated, reference, k)
    distances, _ = NearestNeighbors(n_neighbors=k).fit(real).kneighbors(fake)
    return torch.from_numpy(distances.mean(1))


def local_outlier_factor(generated: Tensor, reference: Tensor, *, k: int = 20) -> Tensor:
    """Local outlier factor (Breunig et al. 2000) with respect to the reference, (n,) float64; 1 is ordinary.

    Arguments and errors as in `average_knn_distance`. The reference's own vectors must not be among the generated ones.
    """
    fake, real = _pair(generated, reference, k)
    return torch.from_numpy(-LocalOutlierFactor(n_neighbors=k, novelty=True).fit(real).score_samples(fake))


@dataclass(frozen=True)
class RarityScores:
    """Rarity scores of the samples that lie on the data's manifold.

    Attributes:
        scores: (n,) float64, NaN off the manifold.
        off_manifold: share of samples outside every ball; no score without it.
    """

    scores: Tensor
    off_manifold: float

    @property
    def mean(self) -> float:
        """Mean over the samples on the manifold; NaN if there are none."""
        return self.scores.nanmean().item()


def rarity_scores(generated: Tensor, reference: Tensor, *, k: int = 3, block: int = 1024) -> RarityScores:
    """Rarity score (Han et al. 2022, arXiv:2206.08549): the smallest radius among the real k-NN balls that hold the sample.

    Arguments and errors as in `average_knn_distance`; ``block`` rows of distances are held at once.
    """
    fake, real = _pair(generated, reference, k)
    neighbours = NearestNeighbors(n_neighbors=k).fit(real)
    radii = torch.from_numpy(neighbours.kneighbors()[0][:, -1])  # without arguments a vector is not its own neighbour
    x, y, scores = torch.from_numpy(fake), torch.from_numpy(real), []
    for part in x.split(block):
        inside = torch.cdist(part, y) <= radii
        smallest = torch.where(inside, radii, torch.inf).amin(1)
        scores.append(torch.where(inside.any(1), smallest, torch.nan))
    result = torch.cat(scores)
    return RarityScores(result, result.isnan().double().mean().item())


def rare_subset(reference: Tensor, share: float = 0.1, *, k: int = 5) -> Tensor:
    """Rows (n,) int64 of the reference vectors that are farthest from their k nearest others: the real rare images.

    Args:
        reference: (m, D) features.
        share: of them to take, in (0, 1).
        k: neighbours.

    Raises:
        ValueError: a share out of range or one that takes fewer than two; else as in `average_knn_distance`.
    """
    if not 0 < share < 1 or round(share * len(reference)) < 2:
        raise ValueError(f"share must lie in (0, 1) and take at least two of {len(reference)} vectors, got {share}")
    _, real = _pair(reference, reference, k)
    distances, _ = NearestNeighbors(n_neighbors=k).fit(real).kneighbors()
    order = torch.from_numpy(distances.mean(1)).argsort(descending=True, stable=True)
    return order[: round(share * len(reference))].sort().values


@dataclass(frozen=True)
class RareSubsetReport:
    """Generated images against the real rare ones: Frechet distance (of the features' own kind), precision, recall."""

    frechet: float
    precision: float
    recall: float
    rare: int


def rare_subset_report(generated: Tensor, reference: Tensor, rare: Tensor, *, k: int = 3) -> RareSubsetReport:
    """Compare with a rare subset of the real images: lower Frechet distance means closer to the tail, not better images.

    Args:
        generated: (n, D) features.
        reference: (m, D) features of real images.
        rare: rows of ``reference``, from `rare_subset` or from labels.
        k: neighbours of precision and recall.
    """
    tail = reference[rare]
    moments = []
    for features in (generated, tail):
        collected = FeatureMoments(features.shape[1])
        collected.update(features)
        moments.append(collected)
    distance = frechet_distance(moments[0].mean, moments[0].cov, moments[1].mean, moments[1].cov)
    found = precision_recall(generated, tail, k=k)
    return RareSubsetReport(distance, found.precision, found.recall, len(tail))


@dataclass(frozen=True)
class ScoreHistogram:
    """Shares of several sets of scores in the same bins.

    Attributes:
        edges: (bins + 1,) float64.
        shares: per set, (bins,) float64 that sum to one.
    """

    edges: Tensor
    shares: dict[str, Tensor]


def score_histograms(scores: dict[str, Tensor], *, bins: int = 40) -> ScoreHistogram:
    """Histograms of minority scores over their common range.

    A score that guided says nothing about success: show it beside a measure that did not guide.

    Args:
        scores: per set, (n,) finite.
        bins: of equal width.

    Raises:
        ValueError: no scores, or values that are not finite.
    """
    if not scores or any(len(s) == 0 or not bool(torch.isfinite(s).all()) for s in scores.values()):
        raise ValueError("scores must be at least one set of finite numbers")
    values = {name: s.double().cpu() for name, s in scores.items()}
    low, high = min(s.min().item() for s in values.values()), max(s.max().item() for s in values.values())
    edges = torch.linspace(low, high if high > low else low + 1.0, bins + 1, dtype=torch.float64)
    shares = {name: torch.histogram(s, edges).hist / len(s) for name, s in values.items()}
    return ScoreHistogram(edges, shares)

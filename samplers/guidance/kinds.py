"""Which kinds of rarity a model leaves out: the classifier's shares of real images against those of the model's own."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from .fitting import Samples


class _Classifier(Protocol):
    bins: int
    parts: int
    classes: int | None

    def log_prob(self, x: Tensor, alpha: Tensor | float, sigma: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
        """As `samplers.guidance.shifts.Classifier`."""
        ...


@torch.no_grad()
def kind_shares(
    classifier: _Classifier,
    data: Samples,
    *,
    level: float = 0.9,
    class_labels: Tensor | None = None,
    batch_size: int = 256,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Tensor:
    r"""Share of samples that belong to every kind (part of the rarest bin): the mean of the classifier's probabilities.

    A classifier is biased, but alike for real and for generated samples: compare two such shares, not one with a count.

    Args:
        classifier: of bins, the rarest split into parts.
        data: (N, *E) clean samples in the model's units.
        level: share of signal alpha_bar at which the samples are shown; the classifier was trained on noisy ones.
        class_labels: (N,), for a class-conditional classifier.
        batch_size: samples at a time.
        seed: of the noise.
        device: where the classifier is.

    Returns:
        (parts,) float64.

    Raises:
        ValueError: no samples, or a level outside (0, 1).
    """
    if len(data) == 0 or not 0 < level < 1:
        raise ValueError(f"shares need samples and a level in (0, 1), got {len(data)} samples and {level}")
    alpha, sigma = math.sqrt(level), math.sqrt(1 - level)
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(classifier.parts, dtype=torch.float64)
    for rows in torch.arange(len(data)).split(batch_size):
        x0 = data[rows].float()
        x = alpha * x0.to(device) + sigma * torch.randn(x0.shape, generator=generator).to(device)
        classes = None if class_labels is None else class_labels[rows].to(device)
        total += classifier.log_prob(x, alpha, sigma, classes).exp()[:, classifier.bins - 1 :].sum(0).double().cpu()
    return total / len(data)


def missing_kinds(real: Tensor, generated: Tensor, count: int = 1) -> str:
    """The guidance label of the kinds that the model most certainly makes too little of.

    They are ordered by (real - generated) / sqrt(real): what is missing in standard errors of the generated share, so that a
    kind of few images is not chosen for the chance that hardly any of it came.

    Args:
        real: (parts,) `kind_shares` of the data.
        generated: (parts,) of several hundred unguided samples.
        count: how many kinds.

    Returns:
        "part:K[,K...]", the most neglected first.

    Raises:
        ValueError: shapes that differ, or a count outside 1..parts.
    """
    if real.ndim != 1 or real.shape != generated.shape:
        raise ValueError(f"shares must both be (parts,), got {tuple(real.shape)} and {tuple(generated.shape)}")
    if not 1 <= count <= len(real):
        raise ValueError(f"count must lie in 1..{len(real)}, the number of kinds, got {count}")
    order = ((real - generated) / real.clamp(min=1e-12).sqrt()).argsort(descending=True, stable=True)
    return "part:" + ",".join(str(k) for k in order[:count].tolist())

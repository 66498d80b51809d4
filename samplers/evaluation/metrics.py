"""Distances as torchmetrics metrics, for training loops: ``update`` with images, ``compute``, ``reset``.

They follow torchmetrics' rules: several processes are synchronised in ``compute``, which every process must then call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from .features import FeatureExtractor
from .kernels import kernel_distance
from .references import Reference


class FrechetDistance(Metric):
    """Frechet distance of generated images to a reference; FID where the extractor's features are FID's.

    Sums are kept in float64 around the reference's mean, so memory does not grow with the number of images, and the
    sums of several processes simply add up.

    Args:
        extractor: uint8 images to features.
        reference: real features of the same protocol.
        options: passed to ``torchmetrics.Metric``.

    Raises:
        ValueError: the reference was made with another protocol.
    """

    higher_is_better = False
    is_differentiable = False
    full_state_update = False
    n: Tensor
    total: Tensor
    outer: Tensor

    def __init__(self, extractor: FeatureExtractor, reference: Reference, **options: Any) -> None:
        """Factorise the reference."""
        super().__init__(**options)
        _same(extractor, reference)
        self._extractor = extractor
        self._side = reference.frechet(extractor.protocol)
        dim = len(self._side.mu)
        self.add_state("n", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(dim, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("outer", torch.zeros(dim, dim, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, images: Tensor) -> None:
        """Add images (B, 1 or 3, H, W) uint8."""
        features = self._extractor(images).to(self.total.device, torch.float64) - self._side.mu.to(self.total.device)
        self.n = self.n + len(features)
        self.total = self.total + features.sum(0)
        self.outer.addmm_(features.mT, features)

    def compute(self) -> Tensor:
        """The distance, a float64 scalar.

        Raises:
            ValueError: fewer than two images.
        """
        if int(self.n) < 2:
            raise ValueError(f"a Frechet distance needs at least 2 images, not {int(self.n)}")
        mean = self.total / self.n
        cov = (self.outer - self.n * torch.outer(mean, mean)) / (self.n - 1)
        value = self._side.distance(mean.cpu() + self._side.mu, cov.cpu())
        return torch.tensor(value, dtype=torch.float64, device=self.total.device)


class KernelDistance(Metric):
    """Unbiased kernel distance (KID) of generated images to a reference; keeps all features.

    Args:
        extractor: uint8 images to features.
        reference: real features of the same protocol.
        options: passed to ``torchmetrics.Metric``.

    Raises:
        ValueError: the reference was made with another protocol, or holds no features.
    """

    higher_is_better = False
    is_differentiable = False
    full_state_update = False
    features: list[Tensor]

    def __init__(self, extractor: FeatureExtractor, reference: Reference, **options: Any) -> None:
        """Keep the reference."""
        super().__init__(**options)
        _same(extractor, reference)
        self._extractor, self._real = extractor, reference.needs_features("a kernel distance")
        self.add_state("features", [], dist_reduce_fx="cat")

    def update(self, images: Tensor) -> None:
        """Add images (B, 1 or 3, H, W) uint8."""
        self.features.append(self._extractor(images).to(self.device))

    def compute(self) -> Tensor:
        """The distance, a float64 scalar.

        Raises:
            ValueError: fewer than two images.
        """
        features = torch.cat(self.features) if isinstance(self.features, list) and self.features else self.features
        if isinstance(features, list):
            raise ValueError("a kernel distance needs at least 2 images, not 0")
        return torch.tensor(kernel_distance(features, self._real), dtype=torch.float64, device=self.device)


def _same(extractor: FeatureExtractor, reference: Reference) -> None:
    if reference.protocol != extractor.protocol.id:
        raise ValueError(f"the reference was made with {reference.protocol}, not with {extractor.protocol.id}")

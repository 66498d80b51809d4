"""Mean and covariance of features, streamed: memory does not grow with the number of images."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .symmetric import add_lower_, full


class FeatureMoments:
    """Mean and covariance of a stream of feature vectors, in float64.

    Rows are collected in a buffer of at least ``dim`` rows before they enter the (dim, dim) scatter matrix, because one
    such update costs as much memory traffic for one row as for many. Updates and merges use the pairwise formula of Chan,
    Golub & LeVeque (1979), which stays exact when the mean is large against the spread.

    Args:
        dim: length of a feature vector.
        rows: of the buffer; max(dim, 256) by default.
        device: where the sums are kept. It must know float64 (Apple's does not: keep the sums on the CPU there).
    """

    def __init__(self, dim: int, *, rows: int | None = None, device: str | torch.device = "cpu") -> None:
        """Start with no vectors."""
        if dim < 1:
            raise ValueError(f"dim must be at least 1, not {dim}")
        self.dim = dim
        self._rows = rows if rows is not None else max(dim, 256)
        self._device = torch.device(device)
        self._count: int | None = 0
        self._mean = torch.zeros(dim, dtype=torch.float64, device=self._device)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64, device=self._device)  # its lower triangle
        self._buffer: Tensor | None = None
        self._filled = 0

    @property
    def n(self) -> int | None:
        """Vectors seen; None for moments from a file that does not say."""
        return None if self._count is None else self._count + self._filled

    @property
    def mean(self) -> Tensor:
        """(dim,) float64."""
        self._flush()
        return self._mean.clone()

    @property
    def cov(self) -> Tensor:
        """(dim, dim) float64, with n - 1 in the denominator.

        Raises:
            ValueError: fewer than two vectors.
        """
        self._flush()
        if self._count is None:
            return self._scatter.clone()
        if self._count < 2:
            raise ValueError(f"a covariance needs at least 2 feature vectors, not {self._count}")
        return full(self._scatter) / (self._count - 1)

    def update(self, features: Tensor) -> None:
        """Add feature vectors.

        Args:
            features: (B, dim), any floating dtype and device.

        Raises:
            ValueError: another shape, values that are not finite, or moments that do not know their n.
        """
        self._appendable()
        features = torch.as_tensor(features)
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"features must be (B, {self.dim}), not {tuple(features.shape)}")
        if self._buffer is None:
            self._buffer = torch.empty(self._rows, self.dim, dtype=torch.float64, device=self._device)
        start = 0
        while start < len(features):
            take = min(self._rows - self._filled, len(features) - start)
            self._buffer[self._filled : self._filled + take].copy_(features[start : start + take])
            self._filled, start = self._filled + take, start + take
            if self._filled == self._rows:
                self._flush()

    def merge(self, other: FeatureMoments) -> FeatureMoments:
        """Add what another one has seen, in place.

        Raises:
            ValueError: another ``dim``, or moments that do not know their n.
        """
        self._appendable()
        other._appendable()
        if other.dim != self.dim:
            raise ValueError(f"cannot merge moments of {other.dim} features into moments of {self.dim}")
        self._flush()
        other._flush()
        assert other._count is not None
        self._combine(other._count, other._mean.to(self._device))
        if other._count:
            self._scatter.add_(other._scatter.to(self._device))
        return self

    def save(self, path: str | Path) -> None:
        """Write ``mu``, ``sigma`` (the field's layout) and ``n`` as an npz file; whole or not at all."""
        path = Path(path)
        partial = path.with_name(path.name + f".{os.getpid()}.part")
        extra = {} if self.n is None else {"n": np.int64(self.n)}
        with partial.open("wb") as file:
            np.savez(file, mu=self.mean.cpu().numpy(), sigma=self.cov.cpu().numpy(), **extra)
        partial.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> FeatureMoments:
        """Read an npz file with ``mu`` and ``sigma``, as EDM, ADM, clean-fid and pytorch-fid write them.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it has no ``mu`` and ``sigma`` of fitting shapes.
        """
        with np.load(path, allow_pickle=False) as file:
            missing = {"mu", "sigma"} - set(file.files)
            if missing:
                raise ValueError(f"{path} has no {' and no '.join(sorted(missing))}; it has {', '.join(file.files)}")
            mu, sigma = (torch.from_numpy(file[key].astype(np.float64)) for key in ("mu", "sigma"))
            n = int(file["n"]) if "n" in file.files else None
        return cls.from_mean_cov(mu, sigma, n)

    @classmethod
    def from_mean_cov(cls, mean: Tensor, cov: Tensor, n: int | None = None) -> FeatureMoments:
        """Moments from their values; without ``n`` they can be read but not added to.

        Raises:
            ValueError: shapes that do not fit, or values that are not finite.
        """
        if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
            raise ValueError(f"mean and covariance must be (D,) and (D, D), not {tuple(mean.shape)} and {tuple(cov.shape)}")
        if not (mean.isfinite().all() and cov.isfinite().all()):
            raise ValueError("mean or covariance is not finite")
        moments = cls(len(mean), device=mean.device)
        moments._count, moments._mean = n, mean.to(torch.float64)
        moments._scatter = cov.to(torch.float64) * (1 if n is None else n - 1)
        return moments

    def _appendable(self) -> None:
        if self._count is None:
            raise ValueError("these moments come from a file without n, so nothing can be added to them")

    def _flush(self) -> None:
        """Move the buffer into the sums; here, not per batch, the values are checked."""
        if self._buffer is None or not self._filled:
            return
        rows, count = self._buffer[: self._filled], self._filled
        self._filled = 0
        mean = rows.mean(0)
        if not bool(mean.isfinite().all()):
            raise ValueError("features are not finite")
        rows -= mean  # in the buffer, which is free after this
        self._combine(count, mean)
        add_lower_(self._scatter, rows, rows)

    def _combine(self, count: int, mean: Tensor) -> None:
        """Take in the mean of ``count`` vectors, and what their distance from the others' mean adds to the scatter."""
        assert self._count is not None
        total = self._count + count
        if not count:
            return
        delta = mean - self._mean
        if self._count:
            self._scatter.addr_(delta, delta, alpha=self._count * count / total)
        self._mean = self._mean + delta * (count / total)
        self._count = total

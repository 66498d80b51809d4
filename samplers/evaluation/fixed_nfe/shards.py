"""Features of a range of seeds in one file: written whole or not at all, skipped when present."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """Features of consecutive seeds.

    Attributes:
        features: (n, D) float32, in the order of the seeds.
        images: (k, C, H, W) uint8, of the first k seeds; k may be 0.
        clip_scores: (n,) float32, or empty.
        nfe: counted evaluations per image.
        passes: network passes per evaluation; 2 with guidance.
        sampling_seconds: wall time in which images were made.
        feature_seconds: wall time in which features were made; it overlaps.
        cpu_seconds: processor time of both.
    """

    features: Tensor
    images: Tensor
    clip_scores: Tensor
    nfe: float
    passes: float
    sampling_seconds: float
    feature_seconds: float
    cpu_seconds: float


class ShardFolder:
    """The shards of one cell.

    Args:
        root: of all shards of a run.
        digest: of the cell.
    """

    def __init__(self, root: Path, digest: str) -> None:
        """Name the folder; it is made with the first shard."""
        self.path = root / digest

    def file(self, seeds: range) -> Path:
        """Where the shard of these seeds is."""
        return self.path / f"{seeds.start:09d}-{seeds.stop:09d}.npz"

    def missing(self, shards: Iterable[range]) -> list[range]:
        """Those that are not there."""
        return [seeds for seeds in shards if not self.file(seeds).is_file()]

    def write(self, seeds: range, shard: Shard) -> None:
        """Write a shard under another name and rename it, so that a killed process leaves nothing that looks whole."""
        path = self.file(seeds)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.part")
        tensors = {key: getattr(shard, key).numpy() for key in ("features", "images", "clip_scores")}
        numbers = {key: np.float64(getattr(shard, key)) for key in _NUMBERS}
        try:
            with partial.open("wb") as file:
                np.savez(file, **tensors, **numbers)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def read(self, seeds: range) -> Shard:
        """Read one.

        Raises:
            ValueError: it does not hold what its name says.
        """
        path = self.file(seeds)
        with np.load(path, allow_pickle=False) as file:
            tensors = {key: torch.from_numpy(file[key]) for key in ("features", "images", "clip_scores")}
            numbers = {key: float(file[key]) for key in _NUMBERS}
        if len(tensors["features"]) != len(seeds):
            raise ValueError(f"{path} holds {len(tensors['features'])} images, not {len(seeds)}; delete it and run again")
        return Shard(**tensors, **numbers)


_NUMBERS = ("nfe", "passes", "sampling_seconds", "feature_seconds", "cpu_seconds")

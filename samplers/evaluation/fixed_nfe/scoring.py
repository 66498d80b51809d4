"""From the shards of a cell to its numbers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from ..extrapolation import frechet_infinity
from ..features import FeatureProtocol
from ..frechet import FrechetReference
from ..kernels import gaussian_kernel_distance, kernel_distance
from ..moments import FeatureMoments
from ..neighbours import prdc
from ..references import Reference
from ..transport import energy_distance, sliced_wasserstein
from .shards import ShardFolder

METRICS = {
    "frechet": "Frechet distance (FID where the features are FID's)",
    "kernel": "unbiased polynomial kernel distance (KID)",
    "prdc": "precision, recall (k = 3), density, coverage (k = 5)",
    "infinity": "Frechet distance extrapolated to infinitely many images",
    "cmmd": "Gaussian kernel distance (CMMD on CLIP features)",
    "sw2": "sliced 2-Wasserstein distance of the features",
    "energy": "energy distance of the features",
    "clip-score": "CLIPScore against the prompts",
}
NEIGHBOURS = {"precision": 3, "recall": 3, "density": 5, "coverage": 5}


def frechet_key(protocol: FeatureProtocol) -> str:
    """The key of the Frechet distance; it says fid only where it is one."""
    return "fid" if protocol.name.startswith("fid-") else "fd"


def check_metrics(metrics: Sequence[str], reference: Reference, *, prompts: bool) -> None:
    """Refuse metrics that cannot be computed, before anything is.

    Raises:
        ValueError: unknown, without the features or prompts that it needs.
    """
    for metric in metrics:
        if metric not in METRICS:
            raise ValueError(f"unknown metric {metric!r}; known: {', '.join(METRICS)}")
        if metric in ("kernel", "prdc", "cmmd", "sw2", "energy"):
            reference.needs_features(metric)
        if metric == "clip-score" and not prompts:
            raise ValueError("clip-score needs prompts")
    if not metrics:
        raise ValueError(f"no metrics; known: {', '.join(METRICS)}")


def score(
    folder: ShardFolder,
    shards: Sequence[range],
    metrics: Sequence[str],
    reference: Reference,
    side: FrechetReference,
    protocol: FeatureProtocol,
) -> dict[str, float]:
    """The numbers of one set of images.

    Moments are streamed from the shards; metrics on pairs of images hold all features.

    Args:
        folder: of the cell.
        shards: all there.
        metrics: keys of `METRICS`.
        reference: real features.
        side: the reference, ready for Frechet distances in the protocol's unit.
        protocol: of the features.
    """
    key, values = frechet_key(protocol), dict[str, float]()
    if metrics == ["frechet"] or tuple(metrics) == ("frechet",):
        moments = FeatureMoments(len(side.mu))
        for seeds in shards:
            moments.update(folder.read(seeds).features)
        return {key: side.distance_to_moments(moments)}
    parts = [folder.read(seeds) for seeds in shards]
    features = torch.cat([part.features for part in parts])
    for metric in metrics:
        match metric:
            case "frechet":
                values[key] = side.distance_to_features(features)
            case "infinity":
                line = frechet_infinity(features, side, generator=_generator())
                values |= {f"{key}_inf": line.value, f"{key}_inf_low": line.low, f"{key}_inf_high": line.high}
            case "clip-score":
                values["clip_score"] = torch.cat([part.clip_scores for part in parts]).double().mean().item()
            case _:
                values |= _pairs(metric, features, reference.needs_features(metric), "kid" if key == "fid" else "kd")
    return values


def _pairs(metric: str, features: Tensor, real: Tensor, kernel_key: str) -> dict[str, float]:
    if metric == "kernel":
        return {kernel_key: kernel_distance(features, real)}
    if metric == "cmmd":
        return {"cmmd": gaussian_kernel_distance(features, real)}
    if metric == "sw2":
        return {"sw2": sliced_wasserstein(features, real, generator=_generator())}
    if metric == "energy":
        return {"energy": energy_distance(features, real)}
    by_k = {k: prdc(features, real, k=k) for k in set(NEIGHBOURS.values())}
    return {name: float(getattr(by_k[k], name)) for name, k in NEIGHBOURS.items()}


def summary(repeats: Sequence[dict[str, float]]) -> tuple[dict[str, float], dict[str, float | None]]:
    """Mean over repetitions with other seeds, and their standard deviation (none for one)."""
    mean = {key: statistics.fmean(values[key] for values in repeats) for key in repeats[0]}
    std = {key: statistics.stdev(values[key] for values in repeats) if len(repeats) > 1 else None for key in repeats[0]}
    return mean, std


def _generator() -> torch.Generator:
    """The same subsets and directions for all that is compared."""
    return torch.Generator().manual_seed(0)

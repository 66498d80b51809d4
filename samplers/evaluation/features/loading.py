"""Feature extractors by name."""

from __future__ import annotations

from pathlib import Path

import torch

from .protocol import FeatureExtractor
from .shipped import PixelFeatures, RandomConvFeatures

EXTRACTORS = ("fd-randconv64-v1", "fd-pixel", "fid-tf", "fid-ptfid", "fid-clean", "fd-dinov2", "clip")


def load_extractor(
    name: str = "fd-randconv64-v1",
    *,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    offline: bool = False,
    unverified: bool = False,
) -> FeatureExtractor:
    """A feature extractor.

    Args:
        name: one of `EXTRACTORS`. The first two ship; "fid-tf", "fid-ptfid" and "fid-clean" need the Inception weights,
            "fd-dinov2" and "clip" a model that transformers can load.
        weights: file or folder of the weights, for those that need some.
        device: where it runs.
        offline: never download.
        unverified: accept Inception weights other than the published ones.

    Raises:
        ValueError: unknown name, or an option that does not apply to it.
        MissingModelError: no weights.
    """
    if name not in EXTRACTORS:
        raise ValueError(f"unknown protocol {name!r}; known: {', '.join(EXTRACTORS)}")
    if unverified and not name.startswith("fid-"):
        raise ValueError(
            f"unverified weights apply to {', '.join(n for n in EXTRACTORS if n.startswith('fid-'))}, not to {name}"
        )
    if name in ("fd-randconv64-v1", "fd-pixel"):
        if weights is not None:
            raise ValueError(f"{name} takes no weights: its features ship with the package")
        return RandomConvFeatures(device) if name == "fd-randconv64-v1" else PixelFeatures(device)
    if name.startswith("fid-"):
        from .inception import InceptionFeatures

        return InceptionFeatures(name, weights=weights, device=device, offline=offline, unverified=unverified)
    from .transformer import ClipFeatures, Dinov2Features

    return (Dinov2Features if name == "fd-dinov2" else ClipFeatures)(weights, device=device, offline=offline)

"""Feature extractors by name."""

from __future__ import annotations

import torch

from .protocol import FeatureExtractor
from .shipped import PixelFeatures, RandomConvFeatures

EXTRACTORS = ("fd-randconv64-v1", "fd-pixel")


def load_extractor(name: str = "fd-randconv64-v1", *, device: str | torch.device = "cpu") -> FeatureExtractor:
    """A feature extractor.

    Args:
        name: one of `EXTRACTORS`.
        device: where it runs.

    Raises:
        ValueError: unknown name.
    """
    match name:
        case "fd-randconv64-v1":
            return RandomConvFeatures(device)
        case "fd-pixel":
            return PixelFeatures(device)
    raise ValueError(f"unknown protocol {name!r}; known: {', '.join(EXTRACTORS)}")

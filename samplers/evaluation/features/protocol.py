"""What a feature extractor is, and the id that says exactly how its features were made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class FeatureProtocol:
    """How features were made; numbers with different ids are never compared.

    Attributes:
        name: of the extractor, as "fd-randconv64-v1" or "fid-tf".
        weights: SHA-256 of the weights, or "none".
        resize: how images get to the network's size.
        quantise: how values in [0, 1] became pixels.
        title: of the Frechet distance in tables and figures; it says FID only where it is one.
        unit_variance: the Frechet distance is given in units of the reference's total variance.
    """

    name: str
    weights: str
    resize: str
    quantise: str = "uint8-round"
    title: str = ""
    unit_variance: bool = False

    @property
    def id(self) -> str:
        """One line that names all of it."""
        return f"{self.name}:{self.weights[:16]}:{self.resize}:{self.quantise}"


class FeatureExtractor(Protocol):
    """Images in, features out; the same image gives the same features whatever the batch."""

    @property
    def protocol(self) -> FeatureProtocol:
        """How the features are made."""

    def __call__(self, images: Tensor) -> Tensor:
        """Features of images.

        Args:
            images: (B, 1 or 3, H, W) uint8, on any device.

        Returns:
            (B, D) float32, on the extractor's device.
        """


def quantise(images: Tensor) -> Tensor:
    """Values in [0, 1] as uint8 pixels, rounded to the nearest (not truncated), clamped.

    Raises:
        ValueError: integers, or values that are no numbers.
    """
    if not images.is_floating_point():
        raise ValueError(f"quantise takes floating point values in [0, 1], not {images.dtype}")
    if bool(images.isnan().any()):
        raise ValueError("images hold values that are no numbers")
    return (images.float().clamp(0, 1) * 255).round().to(torch.uint8)


def check_pixels(images: Tensor) -> Tensor:
    """The images, if they are what a `FeatureExtractor` takes.

    Raises:
        ValueError: another dtype or shape; floats are never guessed to be in [0, 1], [-1, 1] or 0..255.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"feature extractors take uint8 pixels, not {images.dtype}: use quantise() on values in [0, 1]")
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be (B, 1 or 3, H, W), not {tuple(images.shape)}")
    return images


def rgb(images: Tensor) -> Tensor:
    """Grey images with their channel three times."""
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images

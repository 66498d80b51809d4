"""Features that need no download: a frozen random convolutional network that ships, and the pixels themselves."""

from __future__ import annotations

import hashlib
from importlib import resources
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from .protocol import FeatureProtocol, check_pixels, rgb

WEIGHTS_FILE = "randconv64-v1.safetensors"
WEIGHTS_SHA256 = "e23f2f3dd09f7a72f4ee152c6cb05cbeabd307228d926a1a6016e5714262b0f5"
LARGEST = 32


def _shrink(images: Tensor) -> Tensor:
    """Values in [0, 1]; images above 32 pixels are brought down to 32, smaller ones stay as they are."""
    values = images.float() / 255
    longest = max(values.shape[-2:])
    if longest <= LARGEST:
        return values
    size = [max(1, round(side * LARGEST / longest)) for side in values.shape[-2:]]
    return F.interpolate(values, size=size, mode="bilinear", align_corners=False, antialias=True)


class RandomConvFeatures:
    """64 features of a random three-layer network: channel means and root mean squares of its last layer.

    Random filters see noise, blur and textures that a classifier is trained to ignore, and higher moments that pixels'
    means and covariances do not hold. The distance on them is no FID, and is not named so. The weights are frozen in a
    file, not drawn from a seed, because random streams change between versions.

    Args:
        device: where the network runs.

    Raises:
        ValueError: the file of the weights is damaged.
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        """Load and check the weights."""
        path = Path(str(resources.files(__package__))) / WEIGHTS_FILE
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != WEIGHTS_SHA256:
            raise ValueError(f"{path} is damaged: its SHA-256 is {digest}, not {WEIGHTS_SHA256}; install the package again")
        self._weights = {name: value.to(device) for name, value in load_file(path).items()}
        self._device = torch.device(device)

    @property
    def protocol(self) -> FeatureProtocol:
        """Shipped weights, native size up to 32 pixels."""
        title = "FD (random-conv features, not FID)"
        return FeatureProtocol("fd-randconv64-v1", WEIGHTS_SHA256, f"antialias-{LARGEST}", title=title, unit_variance=True)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, 64) of uint8 images (B, 1 or 3, H, W)."""
        x = rgb(_shrink(check_pixels(images).to(self._device))) * 2 - 1
        for layer, stride in enumerate((1, 2, 2)):
            w, b = self._weights[f"{layer}.weight"], self._weights[f"{layer}.bias"]
            x = F.leaky_relu(F.conv2d(x, w, b, stride=stride, padding=1), 0.2)
        return torch.cat([x.mean((2, 3)), x.square().mean((2, 3)).sqrt()], dim=1)


class PixelFeatures:
    """The pixels: a Frechet distance on them compares means and covariances of images, and is blind to all else.

    Args:
        device: of the features.
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        """Make the extractor; there are no weights."""
        self._device = torch.device(device)

    @property
    def protocol(self) -> FeatureProtocol:
        """No weights, native size up to 32 pixels."""
        title = "FD (pixels, not FID)"
        return FeatureProtocol("fd-pixel", "none", f"antialias-{LARGEST}", title=title, unit_variance=True)

    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, C*H*W) of uint8 images (B, 1 or 3, H, W)."""
        return _shrink(check_pixels(images).to(self._device)).flatten(1)

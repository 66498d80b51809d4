"""How far a reconstruction is from its original: squared and absolute error, features, LPIPS."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

Distance = Callable[[Tensor, Tensor], Tensor]  # (B, *E), (B, *E) -> (B,)

_BACKBONES = {"vgg": "vgg16-397923af.pth", "alex": "alexnet-owt-7be5be79.pth", "squeeze": "squeezenet1_1-b8a52dc0.pth"}
_LPIPS_SMALLEST = 32


def squared_error(x: Tensor, y: Tensor) -> Tensor:
    """Squared Euclidean distance per sample: (B, *E) twice -> (B,)."""
    return (x - y).flatten(1).square().sum(1)


def absolute_error(x: Tensor, y: Tensor) -> Tensor:
    """Sum of absolute differences per sample: (B, *E) twice -> (B,)."""
    return (x - y).flatten(1).abs().sum(1)


def feature_distance(features: Callable[[Tensor], Tensor]) -> Distance:
    """Squared Euclidean distance of features.

    Args:
        features: maps (B, *E) in the model's units to (B, ...).
    """

    def distance(x: Tensor, y: Tensor) -> Tensor:
        return squared_error(features(x), features(y))

    distance.__name__ = f"feature_distance({getattr(features, '__name__', type(features).__name__)})"
    distance.features = features  # type: ignore[attr-defined] - for residuals
    return distance


def lpips(net: str = "vgg") -> Distance:
    """Learned perceptual distance (Zhang et al. 2018, arXiv:1801.03924) of images in [-1, 1], in float32.

    Args:
        net: "vgg", "alex" or "squeeze".

    Raises:
        ValueError: unknown ``net``; later, images below 32 pixels or without 3 channels.
        FileNotFoundError: torchvision's weights of the backbone are not on this machine; nothing is downloaded here.
    """
    if net not in _BACKBONES:
        raise ValueError(f"unknown LPIPS backbone {net!r}; known: {', '.join(_BACKBONES)}")
    weights = Path(torch.hub.get_dir()) / "checkpoints" / _BACKBONES[net]
    if not weights.is_file():
        raise FileNotFoundError(
            f"LPIPS needs torchvision's weights {weights.name} in {weights.parent}: download "
            f"https://download.pytorch.org/models/{weights.name} there, or use distance='l2'"
        )
    from torchmetrics.functional.image.lpips import _NoTrainLpips  # the only part of it that gives one value per image

    network = _NoTrainLpips(net=net)

    def distance(x: Tensor, y: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != 3 or min(x.shape[-2:]) < _LPIPS_SMALLEST:
            raise ValueError(f"LPIPS needs (B, 3, H, W) with sides of at least {_LPIPS_SMALLEST}, got {tuple(x.shape)}")
        network.to(x.device)
        return network(x.float().clamp(-1, 1), y.float().clamp(-1, 1)).flatten(1).sum(1)

    distance.__name__ = f"lpips-{net}"
    return distance


def distance_named(distance: str | Distance) -> Distance:
    """The distance itself, or the one with this name: "l2", "l1", "lpips".

    Raises:
        ValueError: unknown name.
        FileNotFoundError: see `lpips`.
    """
    if callable(distance):
        return distance
    if distance == "lpips":
        return lpips()
    known = {"l2": squared_error, "l1": absolute_error}
    if distance not in known:
        raise ValueError(f"unknown distance {distance!r}; known: l2, l1, lpips, or a function of two batches")
    return known[distance]

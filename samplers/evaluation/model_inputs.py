"""Images as a model takes them: resized, in [-1, 1], in its channels; encoded where the model works in latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .image_sources import ImageSource


@dataclass(frozen=True)
class ModelInputs:
    """An image source as indexable data in the model's units: ``inputs[rows]`` is (B, *E) float32.

    Attributes:
        source: the images.
        channels: of the model's images, 1 or 3.
        size: (H, W) they are brought to: the shorter side is resized, then the centre is cropped.
        encode: from images (B, C, H, W) in [-1, 1] to latents; None for pixel models.
    """

    source: ImageSource
    channels: int
    size: tuple[int, int]
    encode: Callable[[Tensor], Tensor] | None = None

    def __len__(self) -> int:
        """Number of images."""
        return self.source.length

    def __getitem__(self, rows: Any) -> Tensor:
        """Rows by a list or tensor of indices."""
        images = self.images(rows) * 2 - 1
        return images if self.encode is None else self.encode(images)

    def images(self, rows: Any) -> Tensor:
        """The images themselves, (B, C, H, W) float32 in [0, 1]."""
        return torch.stack([self._fit(self.source.image(int(i))) for i in rows])

    def _fit(self, image: Tensor) -> Tensor:
        image = image.float() / 255
        if image.shape[0] != self.channels:
            # ITU-R BT.601 luma, as Pillow's conversion to "L".
            weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
            image = (image * weights).sum(0, keepdim=True) if self.channels == 1 else image[:1].expand(3, -1, -1)
        height, width = self.size
        if tuple(image.shape[-2:]) == self.size:
            return image
        scale = max(height / image.shape[-2], width / image.shape[-1])
        to = [max(side, round(scale * old)) for side, old in zip(self.size, image.shape[-2:], strict=True)]
        image = F.interpolate(image[None], size=to, mode="bicubic", antialias=True, align_corners=False)[0].clamp(0, 1)
        top, left = (to[0] - height) // 2, (to[1] - width) // 2
        return image[:, top : top + height, left : left + width]


def inputs_for(pipe: Any, source: ImageSource, height: int | None = None, width: int | None = None) -> ModelInputs:
    """The images as ``pipe``'s model takes them.

    Raises:
        ValueError: a pipeline whose latents are packed (Flux) or have no fixed size.
    """
    network = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    vae = getattr(pipe, "vae", None)
    if hasattr(pipe, "_pack_latents") or not hasattr(network.config, "sample_size"):
        raise ValueError(f"{type(pipe).__name__} packs its latents: encode the images yourself and use samplers.guidance")
    side = network.config.sample_size
    sides = (side, side) if isinstance(side, int) else tuple(side)
    if vae is None:
        return ModelInputs(source, network.config.in_channels, sides)
    config, factor = vae.config, pipe.vae_scale_factor

    @torch.no_grad()
    def encode(images: Tensor) -> Tensor:
        mean = vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mean.float()
        return (mean - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor

    size = (height or sides[0] * factor, width or sides[1] * factor)
    return ModelInputs(source, config.in_channels, size, encode)

"""The three ways in which images get to Inception's 299 x 299, as the field's tools do it.

A number of one family against reference statistics of another is the classic silent error: for 32-pixel images the resized
pixels differ by 13 of 255 on average.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

SIZE = 299


def resize_tf1(images: Tensor) -> Tensor:
    """TensorFlow 1's bilinear: output pixel i reads at i * in/out, without half-pixel centres and without antialiasing.

    Args:
        images: (B, 3, H, W) floating point, any range.

    Returns:
        (B, 3, 299, 299).
    """
    for dim in (-2, -1):
        length = images.shape[dim]
        # The position is rounded to float32 in the original, which decides the neighbours at whole positions.
        position = torch.arange(SIZE, dtype=torch.float32, device=images.device) * (length / SIZE)
        low = position.long().clamp(max=length - 1)
        high = (low + 1).clamp(max=length - 1)
        shape = (SIZE, 1) if dim == -2 else (SIZE,)
        fraction = (position - low).to(images.dtype).reshape(shape)
        below, above = images.index_select(dim, low), images.index_select(dim, high)
        images = below + (above - below) * fraction
    return images


def resize_torch(images: Tensor) -> Tensor:
    """torch's bilinear with half-pixel centres, without antialiasing; arguments as in `resize_tf1`."""
    return F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", align_corners=False)


def resize_clean(images: Tensor) -> Tensor:
    """Antialiased bicubic as Pillow's, on values 0..255, clipped to them, not rounded; arguments as in `resize_tf1`."""
    return bicubic(images, (SIZE, SIZE)).clamp(0, 255)


def bicubic(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Antialiased bicubic (Pillow's kernel, a = -0.5)."""
    return F.interpolate(images, size=size, mode="bicubic", align_corners=False, antialias=True)

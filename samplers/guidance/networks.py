"""The classifier's networks: a residual MLP for small vectors, half a U-Net for images and latents; both see the level."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_FREQUENCIES = 6
_LAMBDA_RANGE = 8.0  # |log(alpha / sigma)| beyond which levels look alike


class LevelEmbedding(nn.Module):
    """The noise level lambda = log(alpha / sigma) (B,), and optionally a class, as features (B, width)."""

    def __init__(self, width: int, classes: int | None) -> None:
        """``classes`` conditional classes have one embedding each, and one more for "no class"."""
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2 * _FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.classes = None if classes is None else nn.Embedding(classes + 1, width)

    def forward(self, lam: Tensor, class_labels: Tensor | None) -> Tensor:
        """(B,) and (B,) int64 -> (B, width)."""
        angle = lam.clamp(-_LAMBDA_RANGE, _LAMBDA_RANGE)[:, None] * (math.pi / 2 / _LAMBDA_RANGE)
        angle = angle * 2.0 ** torch.arange(_FREQUENCIES, device=lam.device)
        out = self.inner(torch.cat([angle.sin(), angle.cos()], dim=1))
        return out if self.classes is None else out + self.classes(class_labels)


class ResidualMLP(nn.Module):
    """(B, D) -> (B, outputs): residual blocks of width ``width``, modulated by the level."""

    def __init__(self, inputs: int, outputs: int, classes: int | None, *, width: int = 256, depth: int = 3) -> None:
        """``depth`` residual blocks."""
        super().__init__()
        self.embed = LevelEmbedding(width, classes)
        self.first = nn.Linear(inputs, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.levels = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(depth))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)) for _ in range(depth)
        )
        self.last = nn.Sequential(nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, outputs))

    def forward(self, x: Tensor, lam: Tensor, class_labels: Tensor | None) -> Tensor:
        """(B, D) states of unit variance, (B,) levels -> (B, outputs) logits."""
        level = F.silu(self.embed(lam, class_labels))
        h = self.first(x.flatten(1))
        for norm, modulate, block in zip(self.norms, self.levels, self.blocks, strict=True):
            scale, shift = modulate(level).chunk(2, dim=1)
            h = h + block(norm(h) * (1 + scale) + shift)
        return self.last(h)


class _ConvBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(_norm(inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.level = nn.Linear(width, 2 * outputs)
        self.norm = _norm(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        scale, shift = self.level(level)[:, :, None, None].chunk(2, dim=1)
        h = self.norm(self.first(x)) * (1 + scale) + shift
        return self.skip(x) + self.second(F.silu(h))


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(channels, 8), channels)


class AttentionPool(nn.Module):
    """(B, C, H, W) -> (B, C): self-attention over the places, read at their mean (Radford et al. 2021, arXiv:2103.00020)."""

    def __init__(self, channels: int) -> None:
        """Heads of up to 32 channels."""
        super().__init__()
        self.norm = _norm(channels)
        self.attention = nn.MultiheadAttention(channels, max(1, channels // 32), batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Attend from the mean to all places."""
        places = self.norm(x).flatten(2).mT
        mean = places.mean(1, keepdim=True)
        return (mean + self.attention(mean, places, places, need_weights=False)[0])[:, 0]


class HalfUNet(nn.Module):
    """(B, C, H, W) -> (B, outputs): the downward half of a U-Net, ``depth`` blocks per resolution, attention pooling."""

    def __init__(
        self, shape: tuple[int, ...], outputs: int, classes: int | None, *, width: int = 64, depth: int = 2, smallest: int = 4
    ) -> None:
        """Channels double at every halving, up to four times ``width``; halved while both sides stay at least ``smallest``."""
        super().__init__()
        channels, height, across = shape
        self.embed = LevelEmbedding(2 * width, classes)
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.blocks, now, scale = nn.ModuleList(), width, 1
        self.halve: list[int] = []
        while True:
            for _ in range(depth):
                self.blocks.append(_ConvBlock(now, width * scale, 2 * width))
                now = width * scale
            if min(height, across) // 2 < smallest:
                break
            self.halve.append(len(self.blocks))
            height, across, scale = height // 2, across // 2, min(4, 2 * scale)
        self.pool = AttentionPool(now)
        self.last = nn.Linear(now, outputs)

    def forward(self, x: Tensor, lam: Tensor, class_labels: Tensor | None) -> Tensor:
        """(B, C, H, W) states of unit variance, (B,) levels -> (B, outputs) logits."""
        level = F.silu(self.embed(lam, class_labels))
        h = self.first(x)
        for i, block in enumerate(self.blocks):
            if i in self.halve:
                h = F.avg_pool2d(h, 2)
            h = block(h, level)
        return self.last(F.silu(self.pool(h)))

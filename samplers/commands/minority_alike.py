"""Images that are like some examples: numbered sheets, on which a person marks the images of a kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot as plt
from torch import Tensor
from torch.nn import functional as F

from ..evaluation import ModelInputs
from ..guidance import PatchFeatures, Whitening, alike

_SIDE, _RANK = 32, 100  # the size at which images are compared, and the directions that count
_FITTED = 20_000  # images that the whitening is fitted to
_COLUMNS = 20


@dataclass(frozen=True)
class _Small:
    """The images (B, C, H, W) in [-1, 1], no larger than they are compared at."""

    inputs: ModelInputs

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, rows: Any) -> Tensor:
        images = self.inputs.images(rows) * 2 - 1
        side = min(images.shape[-2:])
        if side <= _SIDE:
            return images
        return F.interpolate(images, scale_factor=_SIDE / side, mode="bilinear", antialias=True)


def find_alike(inputs: ModelInputs, examples: Sequence[int], seed: int, bar: Any) -> Tensor:
    """How much every image is like the examples, (N,): by features of patches, whitened over all images.

    Raises:
        ValueError: examples that are no images, or too few images to compare.
    """
    images = _Small(inputs)
    wrong = [i for i in examples if not 0 <= i < len(images)]
    if wrong or not examples:
        raise ValueError(f"--images must name images 0..{len(images) - 1}, got {wrong[0] if wrong else 'none'}")
    if len(images) < 100:
        raise ValueError(f"{inputs.source.id} has {len(images)} images; what is like others shows among 100 or more")
    side = min(images[[0]].shape[-2:])
    seen = PatchFeatures(images, size=max(2, min(5, side // 2)), places=2, seed=seed)
    known = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:_FITTED]
    every = torch.arange(len(images))
    task = bar.add_task("comparing the images", total=len(known) + (len(every) if len(known) < len(every) else 0))

    def features(rows: Tensor, whitening: Callable[[Tensor], Tensor]) -> Tensor:
        found = []
        for part in rows.split(256):
            found.append(whitening(seen(images[part.tolist()])))
            bar.advance(task, len(part))
        return torch.cat(found)

    fitted = features(known, lambda values: values)
    whitening = Whitening.fit(fitted, rank=min(_RANK, fitted.shape[1], len(fitted) // 10))
    if len(known) < len(every):
        return alike(features(every, whitening), examples)
    return alike(whitening(fitted)[known.argsort()], examples)


def numbered_sheet(inputs: ModelInputs, rows: Sequence[int], path: Path) -> None:
    """Draw images with their numbers, for pointing at."""
    lines = -(-len(rows) // _COLUMNS)
    figure, axes = plt.subplots(lines, _COLUMNS, figsize=(0.62 * _COLUMNS, 0.78 * lines), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, row, image in zip(axes.flat, rows, inputs.images(list(rows)), strict=False):
        grey = image.shape[0] == 1
        axis.imshow((image[0] if grey else image.permute(1, 2, 0)).numpy(), cmap="gray" if grey else None, vmin=0, vmax=1)
        axis.set_title(str(row), fontsize=7, pad=1.5)
    figure.subplots_adjust(0.005, 0.005, 0.995, 1 - 0.22 / lines, wspace=0.08, hspace=0.35)
    figure.savefig(path, dpi=120)
    plt.close(figure)

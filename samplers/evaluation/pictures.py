"""Pictures: image grids, quality against NFE, and a solver schedule drawn on the lambda axis."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot as plt
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from .compare import Comparison


def save_image(image: Tensor, path: Path) -> None:
    """Write (C, H, W) in [0, 1] as a PNG; whole or not at all."""
    array = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    partial = path.with_name(path.name + ".part")
    Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array).save(partial, format="PNG")
    partial.replace(path)


def save_grid(images: Tensor, path: Path, *, columns: int = 10, scale: int = 1) -> None:
    """Write (B, C, H, W) in [0, 1] as one PNG, enlarged ``scale`` times without smoothing."""
    big = images.repeat_interleave(scale, dim=-1).repeat_interleave(scale, dim=-2)
    save_image(make_grid(big, nrow=columns, padding=2, pad_value=1.0), path)


def comparison_figure(results: Sequence[Comparison], reference: Tensor, path: Path, *, show: int = 10) -> None:
    """One row of the same noises per sampler at its smallest NFE, the converged images on top, and RMSE against NFE beside."""
    smallest = min(result.nfe for result in results)
    rows = [("converged", reference)] + [(f"{r.sampler}\n{r.nfe} evaluations", r.images) for r in results if r.nfe == smallest]
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 0.62 * len(rows) + 1.6), width_ratios=(1.5, 1))
    strips = [make_grid(images[:show], nrow=show, padding=1, pad_value=1.0) for _, images in rows]
    left.imshow(torch.cat(strips, dim=1).permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
    height = strips[0].shape[1]
    left.set_yticks([height * (i + 0.5) for i in range(len(rows))], [label for label, _ in rows], fontsize=8)
    left.set_xticks([])
    left.set_title(f"the same noise, {smallest} network evaluations")
    for sampler in dict.fromkeys(r.sampler for r in results):
        line = sorted((r for r in results if r.sampler == sampler), key=lambda r: r.nfe)
        style = "--" if sampler.startswith("diffusers") else "-"
        right.plot([r.nfe for r in line], [r.rmse for r in line], style, marker="o", label=sampler)
    right.set_xlabel("network evaluations")
    right.set_ylabel("RMSE to the converged image")
    right.set_yscale("log")
    right.set_xticks(sorted({r.nfe for r in results}))
    right.grid(alpha=0.3)
    right.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)

"""The pictures of the minority commands and the report page of ``fewstep minority sample``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib import pyplot as plt
from torch import Tensor
from torchvision.utils import make_grid

from ..evaluation import ModelInputs, save_grid, score_histograms

_COLUMNS = {
    "minority_score": ("minority score", "mean; the measure that guided, so no proof by itself"),
    "average_knn": ("k-NN distance", "mean distance to 5 real images; high for rare and for bad images"),
    "outlier_factor": ("outlier factor", "local outlier factor, 20 neighbours; 1 is ordinary"),
    "rarity": ("rarity", "mean rarity score of the images on the manifold"),
    "off_manifold": ("off manifold", "share of images outside every real 3-NN ball"),
    "rare_precision": ("rare precision", "share of images within the balls of the rare tenth of the real images"),
    "rare_recall": ("rare recall", "share of the rare tenth that is within the images' balls"),
    "rare_frechet": ("Frechet to rare", "Frechet distance to the rare tenth, in these features"),
}


def score_figure(scores: dict[str, Tensor], path: Path) -> None:
    """Histograms of minority scores over common bins, one line per set."""
    fewest = min(len(values) for values in scores.values())
    found = score_histograms(scores, bins=max(8, min(40, fewest // 5)))
    figure, axis = plt.subplots(figsize=(7, 3.2))
    for name, shares in found.shares.items():
        axis.stairs(shares.numpy(), found.edges.numpy(), label=f"{name} ({len(scores[name])})")
    axis.set_xlabel("minority score (higher is rarer)")
    axis.set_ylabel("share of images")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def save_sheets(inputs: ModelInputs, scores: Tensor, classes: Tensor | None, count: int, out: Path) -> list[int]:
    """Write ``rarest.png`` and ``commonest.png``, one row per class where there are classes; returns the rarest in order."""
    scale = max(1, 48 // max(inputs.size))
    order = scores.argsort(descending=True, stable=True)
    for name, ranked in (("rarest", order), ("commonest", order.flip(0))):
        shown, columns = ranked[:count], min(10, count, len(ranked))
        if classes is not None:
            groups = [ranked[classes[ranked] == label] for label in classes.unique()]
            columns = min(max(1, count // len(groups)), *(len(group) for group in groups))
            shown = torch.cat([group[:columns] for group in groups])
        save_grid(inputs.images(shown.tolist()), out / f"{name}.png", columns=columns, scale=scale)
    return order.tolist()


def kinds_figure(inputs: ModelInputs, scores: Tensor, labels: Tensor, bins: int, path: Path) -> list[dict[str, Any]]:
    """Draw images of every kind, spread over the data set, and return what is known of the kinds.

    Args:
        inputs: the images.
        scores: (N,).
        labels: (N,) of `split_rarest`.
        bins: L; labels from L-1 on are kinds.
        path: of the picture.
    """
    kinds = [(labels == label).nonzero().flatten() for label in range(bins - 1, int(labels.max()) + 1)]
    figure, axes = plt.subplots(len(kinds), 1, figsize=(9, 1.9 * len(kinds)), squeeze=False)
    known = []
    for k, (rows, axis) in enumerate(zip(kinds, axes[:, 0], strict=True)):
        chosen = rows[torch.linspace(0, len(rows) - 1, min(32, len(rows))).round().long()]
        grid = make_grid(inputs.images(chosen.tolist()), nrow=16, padding=1, pad_value=1.0)
        axis.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_axis_off()
        mean = scores[rows].mean().item()
        axis.set_title(f"part:{k}    {len(rows)} images ({len(rows) / len(labels):.1%}), mean score {mean:.4g}", loc="left")
        known.append({"part": k, "images": len(rows), "mean_score": mean})
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return known


def write_report(record: dict[str, Any], out: Path) -> Path:
    """Write ``report.html`` beside its pictures, and return its path."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("minority.html").render(columns=_COLUMNS, **record)
    path = out / "report.html"
    partial = out / "report.html.part"
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)
    return path

"""The report page of ``fewstep minority sample``: table, histograms, image grids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib import pyplot as plt
from torch import Tensor

from ..evaluation import score_histograms

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
    found = score_histograms(scores)
    figure, axis = plt.subplots(figsize=(7, 3.2))
    for name, shares in found.shares.items():
        axis.stairs(shares.numpy(), found.edges.numpy(), label=f"{name} ({len(scores[name])})")
    axis.set_xlabel("minority score (higher is rarer)")
    axis.set_ylabel("share of images")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


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

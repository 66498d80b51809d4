"""What can be measured about rare images: every set against real images, their rare tenth, and the kinds of rarity."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import Progress
from torch import Tensor

from .. import evaluation
from .minority_report import score_figure
from .minority_sampling import Drawn, kind_shares
from .minority_setup import Setup

if TYPE_CHECKING:
    from ..guidance import MinorityClassifier


def compare_sets(
    setup: Setup, classifier: MinorityClassifier, drawn: Drawn, out: Path, *, reference: int, protocol: str, seed: int,
    bar: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Measure every set against real images and their rare tenth; writes the pictures of the report."""
    inputs = setup.inputs
    rows = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))[:reference]
    real_images = inputs.images(rows.tolist())
    extract = evaluation.load_extractor(protocol)
    task = bar.add_task("measuring", total=len(drawn.sets) + 1)

    def features(images: Tensor) -> Tensor:
        return torch.cat([extract(evaluation.quantise(part)) for part in images.split(256)])

    real = features(real_images)
    rare = evaluation.rare_subset(real)
    scores = {"data": setup.scores(real_images, seed, None if setup.classes is None else setup.classes[rows])}
    common = torch.ones(len(real), dtype=torch.bool)
    common[rare] = False
    bar.advance(task)
    table: dict[str, dict[str, float]] = {}
    # Rows of real images, halves apart: what the measures say of ordinary and of rare real images.
    for name, chosen in (("real, common", common.nonzero().flatten()[::2]), ("real, rare", rare[::2])):
        rest = torch.ones(len(real), dtype=torch.bool)
        rest[chosen] = False
        table[name] = _measures(real[chosen], real[rest], rare, rest, scores["data"][chosen])
    known = classifier.facts.get("kinds") or []
    kinds = {"real": [kind["share"] for kind in known]} if known else {}
    for name, images in drawn.sets.items():
        scores[name] = setup.scores(images.images, seed, images.classes)
        every = torch.ones(len(real), dtype=torch.bool)
        table[name] = _measures(features(images.images), real, rare, every, scores[name])
        if known:
            kinds[name] = kind_shares(setup, classifier, images, seed).tolist()
        scale = max(1, 48 // images.images.shape[-1])
        shown = images.images[: 10 * min(10, max(1, len(images.images) // 10))]
        evaluation.save_grid(shown, out / f"{_slug(name)}.png", columns=10, scale=scale)
        bar.advance(task)
    score_figure(scores, out / "scores.png")
    pictures = {name: f"{_slug(name)}.png" for name in drawn.sets}
    return {
        "features": protocol, "reference": len(real), "table": table, "kinds": kinds, "label": str(drawn.label),
        "pictures": pictures,
    }  # fmt: skip


def _measures(fake: Tensor, real: Tensor, rare: Tensor, kept: Tensor, scores: Tensor) -> dict[str, float]:
    """One row of the table; ``real`` are the rows ``kept`` of the reference, ``rare`` rows of the whole reference."""
    place = torch.full((len(kept),), -1)
    place[kept] = torch.arange(int(kept.sum()))
    tail = place[rare][place[rare] >= 0]
    k = min(20, len(real) - 1)
    rarity = evaluation.rarity_scores(fake, real)
    report = evaluation.rare_subset_report(fake, real, tail)
    return {
        "minority_score": scores.mean().item(),
        "average_knn": evaluation.average_knn_distance(fake, real, k=min(5, k)).mean().item(),
        "outlier_factor": evaluation.local_outlier_factor(fake, real, k=k).mean().item(),
        "rarity": rarity.mean,
        "off_manifold": rarity.off_manifold,
        "rare_precision": report.precision,
        "rare_recall": report.recall,
        "rare_frechet": report.frechet,
    }


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)

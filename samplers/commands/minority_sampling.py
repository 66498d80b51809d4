"""Guided and unguided images into folders, and what can be measured about them."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from rich.progress import Progress
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from .. import evaluation, guidance
from ..schedulers import swap

if TYPE_CHECKING:
    from ..evaluation import ModelInputs
    from ..guidance import MinorityClassifier, MinorityScorer

_RECORD = "request.json"


@dataclass(frozen=True)
class SampleRequest:
    """What to sample; image i depends on seed + i, and with label "each" on i modulo the parts."""

    sampler: str
    nfe: int
    num: int
    scale: float
    label: int | str
    window: tuple[float, float]
    rejection: int
    batch_size: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-native form."""
        return json.loads(json.dumps(asdict(self)))


def sample_sets(
    pipe: Any,
    classifier: MinorityClassifier,
    request: SampleRequest,
    settings: dict[str, Any],
    scorer: MinorityScorer,
    inputs: ModelInputs,
    out: Path,
    bar: Progress,
) -> dict[str, Tensor]:
    """The images (num, C, H, W) in [0, 1] of every set: guided, unguided and, if asked for, rejection.

    Raises:
        ValueError: the folder holds another run; it is left untouched.
    """
    # Refused before anything is written.
    guidance.label_mask(classifier, request.label, 1)
    guidance.check_guidance(request.scale)
    guidance.Window(*request.window)
    record = out / _RECORD
    wanted = {**request.to_dict(), "scores": settings}
    if record.is_file():
        old = json.loads(record.read_text())
        if old != wanted:
            changed = sorted(key for key in {*old, *wanted} if old.get(key) != wanted.get(key))
            raise ValueError(f"{out} holds another run ({', '.join(changed)} differ); choose another --out")
    elif out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no {_RECORD}; choose another --out")
    guide = guidance.minority_guidance(pipe, classifier, request.scale, request.label, window=request.window)
    what = evaluation.Conditioning(prompts=(settings["prompt"],) if settings["prompt"] else ())
    with swap(pipe, request.sampler) as scheduler:
        scheduler.set_timesteps(request.nfe, **({"mu": 1.0} if scheduler.config.use_dynamic_shifting else {}))
    out.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(wanted, indent=1) + "\n")
    parts = classifier.parts if request.label == "each" else str(request.label).count(",") + 1
    sets = {
        "unguided": _folder(pipe, what, request, out / "unguided", request.num, 1, nullcontext(), bar),
        "guided": _folder(pipe, what, request, out / "guided", request.num, parts, guide, bar),
    }
    if request.rejection:
        total = request.num * request.rejection
        drawn = _folder(pipe, what, request, out / "drawn", total, 1, nullcontext(), bar, first=request.num)
        scores = _scores(drawn, inputs, scorer, request.seed)
        sets[f"rejection, 1 of {request.rejection}"] = drawn[scores.topk(request.num).indices]
    return sets


def _folder(
    pipe: Any,
    what: Any,
    request: SampleRequest,
    folder: Path,
    num: int,
    parts: int,
    guide: AbstractContextManager[Any],
    bar: Progress,
    first: int = 0,
) -> Tensor:
    """Sample into numbered PNGs; batches that are there are not drawn again. Batches begin at multiples of ``parts``."""
    folder.mkdir(parents=True, exist_ok=True)
    size = max(1, request.batch_size // parts) * parts
    task = bar.add_task(f"{folder.name} images", total=num)
    with swap(pipe, request.sampler), guide:
        for start in range(0, num, size):
            batch = range(start, min(start + size, num))
            if not all((folder / f"{i:05d}.png").is_file() for i in batch):
                numbers = range(batch.start + first, batch.stop + first)
                images = evaluation.generate(pipe, what, numbers, steps=request.nfe, seed=request.seed)
                for i, image in zip(batch, images, strict=True):
                    evaluation.save_image(image, folder / f"{i:05d}.png")
            bar.update(task, completed=batch.stop)
    return torch.stack([_read(folder / f"{i:05d}.png") for i in range(num)])


def _read(path: Path) -> Tensor:
    with Image.open(path) as image:
        return pil_to_tensor(image).float() / 255


def _scores(images: Tensor, inputs: ModelInputs, scorer: MinorityScorer, seed: int) -> Tensor:
    scores = []
    for i, part in enumerate(images.split(64)):
        x0 = part * 2 - 1 if inputs.encode is None else inputs.encode(part * 2 - 1)
        scores.append(scorer(x0, torch.Generator().manual_seed(seed + i)).cpu())
    return torch.cat(scores)


def compare_sets(
    sets: dict[str, Tensor],
    inputs: ModelInputs,
    scorer: MinorityScorer,
    out: Path,
    *,
    reference: int,
    protocol: str,
    seed: int,
    bar: Progress,
) -> dict[str, Any]:
    """Measure every set against real images and their rare tenth; writes the pictures of the report."""
    from .minority_report import score_figure

    rows = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))[:reference]
    real_images = inputs.images(rows.tolist())
    extract = evaluation.load_extractor(protocol)
    task = bar.add_task("measuring", total=len(sets) + 1)

    def features(images: Tensor) -> Tensor:
        return torch.cat([extract(evaluation.quantise(part)) for part in images.split(256)])

    real = features(real_images)
    rare = evaluation.rare_subset(real)
    scores = {"data": _scores(real_images, inputs, scorer, seed)}
    common = torch.ones(len(real), dtype=torch.bool)
    common[rare] = False
    bar.advance(task)
    table: dict[str, dict[str, float]] = {}
    # Rows of real images, halves apart: what the measures say of ordinary and of rare real images.
    for name, chosen in (("real, common", common.nonzero().flatten()[::2]), ("real, rare", rare[::2])):
        rest = torch.ones(len(real), dtype=torch.bool)
        rest[chosen] = False
        table[name] = _measures(real[chosen], real[rest], rare, rest, scores["data"][chosen])
    for name, images in sets.items():
        scores[name] = _scores(images, inputs, scorer, seed)
        every = torch.ones(len(real), dtype=torch.bool)
        table[name] = _measures(features(images), real, rare, every, scores[name])
        scale = max(1, 48 // images.shape[-1])
        shown = images[: 10 * min(10, max(1, len(images) // 10))]
        evaluation.save_grid(shown, out / f"{_slug(name)}.png", columns=10, scale=scale)
        bar.advance(task)
    score_figure(scores, out / "scores.png")
    pictures = {name: f"{_slug(name)}.png" for name in sets}
    return {"features": protocol, "reference": len(real), "table": table, "pictures": pictures}


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

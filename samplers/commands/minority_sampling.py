"""Guided and unguided images into folders."""

from __future__ import annotations

import inspect
import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from rich.progress import Progress
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from .. import evaluation, guidance
from ..schedulers import swap
from .minority_setup import Setup

if TYPE_CHECKING:
    from ..guidance import MinorityClassifier

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
    class_labels: tuple[int, ...]
    guidance: float | None
    rejection: int
    batch_size: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-native form."""
        return json.loads(json.dumps(asdict(self)))


@dataclass(frozen=True)
class ImageSet:
    """Images (N, C, H, W) in [0, 1], and the class (N,) of each where rarity is within classes."""

    images: Tensor
    classes: Tensor | None


@dataclass(frozen=True)
class Drawn:
    """The sets of images by name, and the label that guided one of them ("missing:K" resolved)."""

    sets: dict[str, ImageSet]
    label: int | str


def sample_sets(
    setup: Setup, classifier: MinorityClassifier, request: SampleRequest, settings: dict[str, Any], out: Path, bar: Progress
) -> Drawn:
    """Draw every set: unguided, guided and, if asked for, rejection.

    Raises:
        ValueError: a request that cannot be met, before anything is written; or the folder holds another run, which is left
            untouched.
    """
    pipe = setup.pipe
    missing = _missing(classifier, request.label)
    if missing is None:
        guidance.label_mask(classifier, request.label, 1)
    guidance.check_guidance(request.scale)
    guidance.Window(*request.window)
    what = _conditioning(setup, classifier, request, settings["prompt"])
    with swap(pipe, request.sampler) as scheduler:
        scheduler.set_timesteps(request.nfe, **({"mu": 1.0} if scheduler.config.use_dynamic_shifting else {}))
    _claim(out, {**request.to_dict(), "scores": settings})
    unguided = _folder(pipe, what, request, out / "unguided", request.num, 1, nullcontext(), bar)
    sets = {"unguided": ImageSet(unguided, _classes(setup, what, request.num))}
    label = request.label
    if missing is not None:
        real = torch.tensor([kind["share"] for kind in classifier.facts["kinds"]], dtype=torch.float64)
        label = guidance.missing_kinds(real, kind_shares(setup, classifier, sets["unguided"], request.seed), missing)
    guide = guidance.minority_guidance(pipe, classifier, request.scale, label, window=request.window)
    turns = classifier.parts if label == "each" else str(label).count(",") + 1
    guided = _folder(pipe, what, request, out / "guided", request.num, turns, guide, bar)
    sets["guided"] = ImageSet(guided, _classes(setup, what, request.num))
    if request.rejection:
        total = request.num * request.rejection
        images = _folder(pipe, what, request, out / "drawn", total, 1, nullcontext(), bar, first=request.num)
        drawn = ImageSet(images, _classes(setup, what, total, first=request.num))
        sets[f"rejection, 1 of {request.rejection}"] = _rarest(setup, drawn, request)
    return Drawn(sets, label)


def kind_shares(setup: Setup, classifier: MinorityClassifier, images: ImageSet, seed: int) -> Tensor:
    """`guidance.kind_shares` of a set of images, (parts,)."""
    x0 = images.images * 2 - 1
    if setup.inputs.encode is not None:
        x0 = torch.cat([setup.inputs.encode(part).cpu() for part in x0.split(16)])
    device = next(classifier.parameters()).device
    return guidance.kind_shares(classifier, x0, class_labels=images.classes, seed=seed, device=device)


def _missing(classifier: MinorityClassifier, label: int | str) -> int | None:
    """K of the label "missing:K"; None for other labels."""
    name, _, number = str(label).partition(":")
    if name != "missing":
        return None
    if not number.isdecimal() or not 1 <= int(number) <= classifier.parts or classifier.parts == 1:
        raise ValueError(f"--label {label!r}: expected missing:K with K in 1..{classifier.parts}, the classifier's kinds")
    if not classifier.facts.get("kinds"):
        raise ValueError("this classifier's file does not know the kinds' shares of the data: train it again")
    return int(number)


def _conditioning(setup: Setup, classifier: MinorityClassifier, request: SampleRequest, prompt: str | None) -> Any:
    accepted = inspect.signature(setup.pipe.__call__).parameters
    what = evaluation.Conditioning(
        prompts=(prompt or "",) if "prompt" in accepted else (),
        class_labels=request.class_labels,
        guidance=request.guidance,
    )
    what.check(setup.pipe)
    if classifier.classes is None:
        return what
    wrong = [label for label in request.class_labels if label >= classifier.classes]
    if wrong:
        raise ValueError(f"--class-labels {wrong}: the classifier knows the classes 0..{classifier.classes - 1}")
    return replace(what, class_labels=request.class_labels or tuple(range(classifier.classes)))


def _classes(setup: Setup, what: Any, num: int, first: int = 0) -> Tensor | None:
    """The class of every image, where it matters."""
    if setup.classes is None:
        return None
    labels = torch.tensor(what.class_labels)
    return labels[torch.arange(first, first + num) % len(labels)]


def _claim(out: Path, wanted: dict[str, Any]) -> None:
    """Write down what the folder holds, or refuse one that holds something else."""
    record = out / _RECORD
    if record.is_file():
        old = json.loads(record.read_text())
        if old != wanted:
            changed = sorted(key for key in {*old, *wanted} if old.get(key) != wanted.get(key))
            raise ValueError(f"{out} holds another run ({', '.join(changed)} differ); choose another --out")
    elif out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no {_RECORD}; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(wanted, indent=1) + "\n")


def _rarest(setup: Setup, drawn: ImageSet, request: SampleRequest) -> ImageSet:
    """The rarest of what was drawn; the rarest of every class where rarity is within classes."""
    scores = setup.scores(drawn.images, request.seed, drawn.classes)
    if drawn.classes is None:
        return ImageSet(drawn.images[scores.topk(request.num).indices], None)
    groups = [(drawn.classes == label).nonzero().flatten() for label in drawn.classes.unique()]
    kept = torch.cat([rows[scores[rows].topk(max(1, len(rows) // request.rejection)).indices] for rows in groups])
    return ImageSet(drawn.images[kept], drawn.classes[kept])


def _folder(
    pipe: Any, what: Any, request: SampleRequest, folder: Path, num: int, turns: int, guide: AbstractContextManager[Any],
    bar: Progress, first: int = 0,
) -> Tensor:  # fmt: skip
    """Sample into numbered PNGs; batches that are there are not drawn again. Batches begin at multiples of ``turns``."""
    folder.mkdir(parents=True, exist_ok=True)
    size = max(1, request.batch_size // turns) * turns
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

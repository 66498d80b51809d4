"""Part 3 of the minority benchmark: 16-pixel CIFAR-10, two classes thinned to 1%, judged by a classifier of its own.

The judge is a small convolutional network trained on all images of the eight classes, thinned or not, and never used for
scoring or guiding. Its mistakes set the floor: the first rows say how often it calls common test images rare, and finds rare
ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from minority_record import Row
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from samplers import NoiseSchedule
from samplers.denoisers import from_network
from samplers.evaluation import precision_recall
from samplers.guidance import (
    FitSettings,
    MinorityClassifier,
    MinorityScorer,
    equal_count_bins,
    fit,
    minority_guidance,
    split_rarest,
)
from samplers.reference import load_folder
from samplers.schedulers import swap

sys.path.insert(0, str(Path(__file__).parent / "models"))
from train_cifar16_thinned import COMMON, RARE, thinned_images

COUNT, STEPS, FEW, PARTS, DRAWS, SAMPLED = 200, 50, 10, 8, 5, 10_000
FIT = {"steps": 1500, "batch_size": 128, "lr": 1e-3, "flip": True}
JUDGE_STEPS = 1500
MODEL = Path(__file__).parent / "models" / "cifar16-thinned"


def judge_network() -> nn.Module:
    """The untrained judge: (B, 3, 16, 16) -> (B, 10) logits."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]

    layers = [*block(3, 32), *block(32, 64), nn.MaxPool2d(2), *block(64, 128), nn.MaxPool2d(2), *block(128, 128)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def _split(data: Path, split: str) -> tuple[Tensor, Tensor]:
    """All images of the eight classes of one split, in [-1, 1], and their labels."""
    file = np.load(data)
    labels = torch.from_numpy(file[f"{split}_labels"]).long()
    rows = torch.isin(labels, torch.tensor([*COMMON, *RARE]))
    images = torch.from_numpy(file[split][rows.numpy()]).permute(0, 3, 1, 2).float() / 127.5 - 1
    return images, labels[rows]


def trained_judge(data: Path, path: Path) -> nn.Module:
    """The judge, trained once and kept."""
    judge = judge_network()
    if path.is_file():
        judge.load_state_dict(load_file(path))
        return judge.eval()
    torch.manual_seed(0)
    images, labels = _split(data, "train")
    optimiser = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=JUDGE_STEPS)
    for _ in range(JUDGE_STEPS):
        rows = torch.randint(len(images), (128,))
        x = torch.where(torch.rand(len(rows), 1, 1, 1) < 0.5, images[rows].flip(-1), images[rows])
        loss = nn.functional.cross_entropy(judge(x), labels[rows], label_smoothing=0.05)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    save_file({name: value.contiguous() for name, value in judge.state_dict().items()}, path)
    return judge.eval()


class Cifar:
    """The thinned model with its data, scores, classifier and judge."""

    def __init__(self, seed: int, cache: Path, data: Path) -> None:
        if not (MODEL / "model_index.json").is_file():
            raise FileNotFoundError(f"no model {MODEL}: train it with benchmarks/models/train_cifar16_thinned.py")
        self.seed, self.cache, self.path = seed, cache, data
        self.pipe = load_folder(MODEL)
        self.noise = NoiseSchedule.from_config(self.pipe.scheduler.config)
        self.judge = trained_judge(data, cache / "cifar-judge.safetensors")
        images, classes = thinned_images(data)
        keep = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:SAMPLED]
        keep = torch.cat([keep, torch.isin(classes, torch.tensor([*RARE])).nonzero().flatten()]).unique()
        self.data, self.classes = images[keep], classes[keep]  # all rare images and a sample of the common ones
        denoiser = from_network(self.pipe.unet, self.noise)
        self.scorer = MinorityScorer(denoiser, self.noise, draws=DRAWS, clip=1.0).calibrated(images[:4000])

    def _batches(self, one: Callable[..., Tensor], x: Tensor, offset: int) -> Tensor:
        generator = torch.Generator().manual_seed(offset)
        return torch.cat([one(part, generator) for part in x.split(256)])

    @cached_property
    def labels(self) -> Tensor:
        path = self.cache / "cifar-labels.pt"
        if not path.is_file():
            bins = equal_count_bins(self._batches(self.scorer, self.data, 0), 10)
            residuals = self._batches(self.scorer.residuals, self.data[bins == 9], 1)
            torch.save(split_rarest(bins, residuals, PARTS), path)
        return torch.load(path, weights_only=True)

    @cached_property
    def classifier(self) -> MinorityClassifier:
        path = self.cache / f"cifar-{self.seed}.safetensors"
        if not path.is_file():
            made = MinorityClassifier((3, 16, 16), 10, parts=PARTS, width=32, depth=1, seed=self.seed)
            fit(made, self.data, self.labels, self.noise, FitSettings(**FIT, seed=self.seed))
            made.save(path)
        return MinorityClassifier.load(path)

    def rare(self, x: Tensor) -> Row:
        """Shares of the rare classes according to the judge."""
        with torch.no_grad():
            found = torch.cat([self.judge(part).argmax(1) for part in x.split(512)])
        return {name: (found == label).double().mean().item() for label, name in RARE.items()}

    def measure(self, x: Tensor) -> Row:
        shares = self.rare(x)
        precision = precision_recall(x.flatten(1), self.data.flatten(1), k=3).precision
        return {**shares, "both": sum(shares.values()), "precision": precision}

    def draw(self, text: str, steps: int, guide: Any = None, count: int | None = None) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * self.seed + 1)
        with swap(self.pipe, text), guide() if guide else nullcontext():
            images = self.pipe(
                batch_size=count or COUNT, num_inference_steps=steps, generator=generator, output_type="np"
            ).images
        return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1

    def rejection(self, candidates: int, text: str, steps: int) -> Tensor:
        drawn = self.draw(text, steps, count=COUNT * candidates)
        return drawn[self._batches(self.scorer, drawn, 2).topk(COUNT).indices]


def rows(seed: int, samplers: list[str], cache: Path, data: Path) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Names of the table's rows and what computes them."""
    cifar = Cifar(seed, cache, data)
    images, labels = _split(data, "test")

    def drawn(text: str, steps: int, **guidance: Any) -> Callable[[], Row]:
        guide = (lambda: minority_guidance(cifar.pipe, cifar.classifier, **guidance)) if guidance else None
        return lambda: cifar.measure(cifar.draw(text, steps, guide))

    common = torch.isin(labels, torch.tensor([*COMMON]))
    yield "judge on common test images", lambda: cifar.rare(images[common])
    for label, name in RARE.items():
        yield f"judge on test images of {name}", lambda label=label: cifar.rare(images[labels == label])
    tenth = lambda: cifar.classes[cifar.labels >= 9]  # noqa: E731
    yield (
        "rarest tenth of the data (true labels; rare classes are kept in full, common ones sampled)",
        lambda: {name: (tenth() == label).double().mean().item() for label, name in RARE.items()},
    )
    yield f"unguided, {STEPS} NFE", drawn("ddpm", STEPS)
    yield f"rejection, 1 of 5, ddpm, {FEW} NFE", lambda: cifar.measure(cifar.rejection(5, "ddpm", FEW))
    for w in (2.0, 4.0, 8.0):
        yield f"rarest bin, w={w:g}", drawn("ddpm", STEPS, scale=w)
    yield "each kind in turn, w=4", drawn("ddpm", STEPS, scale=4.0, label="each")
    for text in samplers:
        yield f"unguided, {text}, {FEW} NFE", drawn(text, FEW)
        yield f"rarest bin, w=4, {text}, {FEW} NFE", drawn(text, FEW, scale=4.0)

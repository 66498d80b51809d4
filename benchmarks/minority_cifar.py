"""Part 3 of the minority benchmark: 16-pixel CIFAR-10, two classes thinned to 1%, judged by a classifier of its own.

Three kinds of knowledge guide: none (the rarest tenth, and its kinds that the model leaves out), pictures that a person marks
on sheets of 800 (their true labels stand in for the person's eye), and all labels of the rare classes, which no one has and
which tells what the model can draw at all. The judge takes part in nothing; its mistakes set the floor, and the first rows say
how often it calls common test images rare, and finds rare ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from minority_record import Row, named
from safetensors.torch import load_file, save_file
from torch import Tensor

from samplers import NoiseSchedule
from samplers.denoisers import from_network
from samplers.evaluation import precision_recall
from samplers.guidance import (
    FitSettings,
    MinorityClassifier,
    MinorityScorer,
    PatchFeatures,
    Whitening,
    alike,
    alpha_bar_of_snr,
    equal_count_bins,
    fit,
    kind_shares,
    marked_kinds,
    minority_guidance,
    missing_kinds,
    split_rarest,
    squared_error,
    top_eigenvalue,
)
from samplers.reference import load_folder
from samplers.schedulers import swap

sys.path.insert(0, str(Path(__file__).parent / "models"))
from minority_judge import images_of, rare_shares, trained_judge
from train_cifar16_thinned import COMMON, RARE, thinned_images

COUNT, STEPS, FEW, PARTS, MISSING, DRAWS, SNR = 100, 50, 10, 24, 3, 2, 0.4
SHEET, MORE, ROUNDS, RANK = 400, 100, 2, 100  # pictures on the first sheet and on each of the later ones
FIT = {"batch_size": 128, "lr": 1e-3, "flip": True, "balanced": True}
MODEL = Path(__file__).parent / "models" / "cifar16-thinned"


class Cifar:
    """The thinned model with its data, scores, classifiers and judge."""

    def __init__(self, seed: int, cache: Path, data: Path) -> None:
        if not (MODEL / "model_index.json").is_file():
            raise FileNotFoundError(f"no model {MODEL}: train it with benchmarks/models/train_cifar16_thinned.py")
        self.seed, self.cache = seed, cache
        self.pipe = load_folder(MODEL)
        self.noise = NoiseSchedule.from_config(self.pipe.scheduler.config)
        self.judge = trained_judge(data, cache / "cifar-judge.safetensors")
        self.data, self.classes = thinned_images(data)
        order = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(0))
        self.reference = self.data[order[:3000]]  # for precision
        self._kept: dict[str, Tensor] = {}

    # ---- what is rare ------------------------------------------------------------------------------------------

    def features(self, x: Tensor) -> Tensor:
        """Features of patches at 2 x 2 places, (N, F)."""
        return self._dictionary(x)

    @cached_property
    def _dictionary(self) -> PatchFeatures:
        return PatchFeatures(self.data, places=2)

    @cached_property
    def seen(self) -> Tensor:
        """Features of all training images."""
        path = self.cache / "cifar-patches.safetensors"
        if not path.is_file():
            save_file({"seen": self.features(self.data)}, path)
        return load_file(path)["seen"]

    @cached_property
    def whitening(self) -> Whitening:
        """Of the features averaged over places."""
        return Whitening.fit(_pooled(self.seen))

    def scores(self, seen: Tensor) -> Tensor:
        """Mahalanobis' squared distance from the mean image, by features: rarity without labels and without the model."""
        return self.whitening(_pooled(seen)).square().sum(1)

    @cached_property
    def labels(self) -> Tensor:
        """Bins of the scores, the rarest split into kinds."""
        path = self.cache / "cifar-labels.safetensors"
        if not path.is_file():
            bins = equal_count_bins(self.scores(self.seen), 10)
            rarest = self.whitening(_pooled(self.seen[bins == 9]))
            save_file({"labels": split_rarest(bins, rarest, PARTS)}, path)
        return load_file(path)["labels"]

    @cached_property
    def marks(self) -> dict[int, list[int]]:
        """Pictures of every rare class that are marked on the sheet of the rarest and then on sheets of what is like them."""
        like = Whitening.fit(self.seen, rank=RANK)(self.seen)
        looked = self.scores(self.seen).topk(SHEET).indices.tolist()
        marks = {label: [i for i in looked if self.classes[i] == label] for label in RARE}
        for _ in range(ROUNDS):
            for label in RARE:
                likeness = alike(like, marks[label])
                likeness[looked] = -2.0  # a picture is looked at once
                sheet = likeness.topk(MORE).indices.tolist()
                looked += sheet
                for other in RARE:
                    marks[other] += [i for i in sheet if self.classes[i] == other]
        return marks

    # ---- classifiers -------------------------------------------------------------------------------------------

    def _trained(self, path: Path, steps: int, labels: Callable[[], Tensor], **shape: int) -> MinorityClassifier:
        if not path.is_file():
            made = MinorityClassifier((3, 16, 16), width=32, depth=1, **shape)
            fit(made, self.data, labels(), self.noise, FitSettings(steps=steps, **FIT, seed=shape["seed"]))
            made.save(path)
        return MinorityClassifier.load(path)

    @cached_property
    def classifier(self) -> MinorityClassifier:
        """Of ten bins, the rarest in kinds; no label of a class is looked at."""
        path = self.cache / f"cifar-{self.seed}.safetensors"
        return self._trained(path, 800, lambda: self.labels, bins=10, parts=PARTS, seed=self.seed)

    @cached_property
    def marked(self) -> MinorityClassifier:
        """Of the marked pictures against all others."""
        path = self.cache / f"cifar-marked-{self.seed}.safetensors"
        labels = lambda: marked_kinds(len(self.data), list(self.marks.values()))  # noqa: E731
        return self._trained(path, 600, labels, bins=2, parts=len(RARE), seed=self.seed)

    @cached_property
    def told(self) -> MinorityClassifier:
        """Of all images of the rare classes; one for all seeds of the benchmark."""
        kinds = lambda: [(self.classes == label).nonzero().flatten() for label in RARE]  # noqa: E731
        labels = lambda: marked_kinds(len(self.data), kinds())  # noqa: E731
        return self._trained(self.cache / "cifar-told.safetensors", 800, labels, bins=2, parts=len(RARE), seed=0)

    @cached_property
    def missing_parts(self) -> str:
        """The kinds that the model makes least of, by 500 unguided images; no class label is looked at."""
        drawn = self.draw("ddpm", FEW, count=500)
        return missing_kinds(kind_shares(self.classifier, self.data), kind_shares(self.classifier, drawn), MISSING)

    # ---- samples and measures ----------------------------------------------------------------------------------

    def draw(self, text: str, steps: int, guide: Any = None, count: int = COUNT) -> Tensor:
        """Images (count, 3, 16, 16) in [-1, 1] from the unmodified pipeline; unguided ones are drawn once."""
        key = f"{text} {steps} {count}"
        if guide is None and key in self._kept:
            return self._kept[key]
        generator = torch.Generator().manual_seed(1000 * self.seed + 1)
        with swap(self.pipe, text), guide() if guide else nullcontext():
            images = self.pipe(batch_size=count, num_inference_steps=steps, generator=generator, output_type="np").images
        drawn = torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1
        if guide is None:
            self._kept[key] = drawn
        return drawn

    def rejection(self, candidates: int, text: str, steps: int, marked: bool) -> Tensor:
        """The best of several times as many images, by score or by the classifier that guides, which costs nothing here."""
        drawn = self.draw(text, steps, count=COUNT * candidates)
        if not marked:
            return drawn[self.scores(self.features(drawn)).topk(COUNT).indices]
        with torch.no_grad():  # every kind's own, as guidance gives every kind its turn
            kinds = self.marked.log_prob(drawn, 0.9999, 0.0141)[:, 1:]
        return torch.cat([drawn[kinds[:, k].topk(COUNT // len(RARE)).indices] for k in range(len(RARE))])

    def measure(self, x: Tensor) -> Row:
        """The judge's shares, and precision against training images."""
        shares = rare_shares(self.judge, x)
        precision = precision_recall(x.flatten(1), self.reference.flatten(1), k=3).precision
        return {**shares, "least covered": min(shares.values()), "both": sum(shares.values()), "precision": precision}

    def ranks(self, scores: Tensor, rows: Tensor) -> Row:
        """How often a score puts an image of a rare class above a common one."""
        classes = self.classes[rows]
        common = scores[torch.isin(classes, torch.tensor([*COMMON]))].sort().values
        below = lambda label: torch.searchsorted(common, scores[classes == label]).double().mean().item()  # noqa: E731
        return {f"AUC {name}": below(label) / len(common) for label, name in RARE.items()}

    def squared_errors(self) -> Row:
        """The published score, on all rare images and 1500 common ones."""
        rare = torch.isin(self.classes, torch.tensor([*RARE]))
        common = (~rare).nonzero().flatten()
        picked = common[torch.randperm(len(common), generator=torch.Generator().manual_seed(self.seed))[:1500]]
        rows, generator = torch.cat([rare.nonzero().flatten(), picked]), torch.Generator().manual_seed(self.seed)
        level = alpha_bar_of_snr(SNR, top_eigenvalue(self.data[:4000]))
        denoiser = from_network(self.pipe.unet, self.noise)
        scorer = MinorityScorer(denoiser, self.noise, level, DRAWS, squared_error, clip=1.0)
        return self.ranks(torch.cat([scorer(part, generator) for part in self.data[rows].split(256)]), rows)

    def shares(self, rows: Tensor) -> Row:
        """Shares of the rare classes among training images, by their true labels."""
        found = {name: (self.classes[rows] == label).double().mean().item() for label, name in RARE.items()}
        return {**found, "both": sum(found.values())}


def _pooled(seen: Tensor) -> Tensor:
    """Features at 2 x 2 places -> their mean over places."""
    return seen.unflatten(1, (-1, 4)).mean(2)


def rows(seed: int, samplers: list[str], cache: Path, data: Path) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Names of the table's rows and what computes them."""
    cifar = Cifar(seed, cache, data)
    images, labels = images_of(data, "test")

    def drawn(
        text: str, steps: int, classifier: Callable[[], Any] | None = None, label: Any = -1, scale: float = 4.0
    ) -> Callable[[], Row]:
        def guide() -> Any:
            chosen = label() if callable(label) else label
            return minority_guidance(cifar.pipe, classifier(), scale, chosen)

        return lambda: cifar.measure(cifar.draw(text, steps, guide if classifier else None))

    def rejected(text: str, marked: bool) -> tuple[str, Callable[[], Row]]:
        by = "marked pictures" if marked else "score"
        name = f"rejection by {by}, 1 of 5, {named(text)}, {FEW} NFE"
        return name, lambda: cifar.measure(cifar.rejection(5, text, FEW, marked))

    bins, marked, told = lambda: cifar.classifier, lambda: cifar.marked, lambda: cifar.told
    few = [*dict.fromkeys(["ddpm", *(text for text in samplers if text.endswith(".json"))])]  # that rejection is tried with
    rare = torch.isin(labels, torch.tensor([*RARE]))
    yield "judge on common test images", lambda: rare_shares(cifar.judge, images[~rare])
    for label, name in RARE.items():
        yield f"judge on test images of {name}", lambda label=label: rare_shares(cifar.judge, images[labels == label])
    each = [images[labels == label][: COUNT // len(RARE)] for label in RARE]
    yield "real test images of the two in turn", lambda: cifar.measure(torch.cat(each))
    yield f"score by squared error, SNR_1 = {SNR:g}", cifar.squared_errors
    every = torch.arange(len(cifar.data))
    yield "score by features of patches", lambda: cifar.ranks(cifar.scores(cifar.seen), every)
    yield "rarest tenth of the data (true labels)", lambda: cifar.shares(cifar.labels >= 9)
    yield (
        "share of the class that is marked",
        lambda: {name: len(cifar.marks[label]) / int((cifar.classes == label).sum()) for label, name in RARE.items()},
    )
    yield f"unguided, {STEPS} NFE", drawn("ddpm", STEPS)
    for text in few:
        yield rejected(text, False)
    yield "rarest bin, w=4", drawn("ddpm", STEPS, bins)
    yield f"{MISSING} most missing kinds in turn, w=4", drawn("ddpm", STEPS, bins, lambda: cifar.missing_parts)
    for text in few:
        yield rejected(text, True)
    for w in (4.0, 8.0):
        yield f"marked pictures, each kind in turn, w={w:g}", drawn("ddpm", STEPS, marked, "each", w)
    for w in (4.0, 8.0):
        yield f"told all labels, each in turn, w={w:g}", drawn("ddpm", STEPS, told, "each", w)
    for text in samplers:
        name, w = named(text), 4.0 if text == "ddpm" else 2.0  # deterministic samplers overshoot
        yield f"unguided, {name}, {FEW} NFE", drawn(text, FEW)
        yield f"rarest bin, w={w:g}, {name}, {FEW} NFE", drawn(text, FEW, bins, -1, w)
        yield f"marked pictures, each kind in turn, w={w:g}, {name}, {FEW} NFE", drawn(text, FEW, marked, "each", w)

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
from minority_record import Row, named
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from samplers import NoiseSchedule
from samplers.denoisers import from_network
from samplers.evaluation import precision_recall
from samplers.guidance import (
    FitSettings,
    MinorityClassifier,
    MinorityScorer,
    NetworkFeatures,
    Whitening,
    alpha_bar_of_snr,
    equal_count_bins,
    feature_distance,
    fit,
    kind_shares,
    minority_guidance,
    missing_kinds,
    split_rarest,
    squared_error,
    top_eigenvalue,
)
from samplers.reference import load_folder
from samplers.schedulers import swap

sys.path.insert(0, str(Path(__file__).parent / "models"))
from train_cifar16_thinned import COMMON, RARE, thinned_images

COUNT, STEPS, FEW, PARTS, CHOSEN, DRAWS, SNR, PLACES = 100, 50, 10, 24, 3, 2, 0.4, 1
FIT = {"steps": 1000, "batch_size": 128, "lr": 1e-3, "flip": True}
LEVELS = (0.1, 0.4, 2.0)  # signal-to-noise ratios at which squared error is tried, on all rare and some common images
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
        self.data, self.classes = thinned_images(data)
        order = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(0))
        self.reference = self.data[order[:3000]]  # for precision
        self.denoiser = from_network(self.pipe.unet, self.noise)
        self.top_variance = top_eigenvalue(self.data[:4000])

    def scorer(self, snr: float, **settings: Any) -> MinorityScorer:
        """A scorer at this signal-to-noise ratio of the leading direction."""
        return MinorityScorer(
            self.denoiser, self.noise, alpha_bar_of_snr(snr, self.top_variance), draws=DRAWS, clip=1.0, **settings
        )

    def _batches(self, one: Callable[..., Tensor], x: Tensor, offset: int) -> Tensor:
        generator = torch.Generator().manual_seed(offset)
        return torch.cat([one(part, generator) for part in x.split(256)])

    @cached_property
    def lost_features(self) -> Callable[[Tensor, int], Tensor]:
        """What reconstruction loses of images' features, (N, F)."""
        seen = NetworkFeatures(self.pipe.unet, self.denoiser, self.noise, places=PLACES)
        scorer = self.scorer(SNR, distance=feature_distance(seen))
        return lambda x, offset: self._batches(scorer.residuals, x, offset)

    @cached_property
    def whitened(self) -> tuple[Whitening, Tensor]:
        """The whitening of what is lost, and of all training images what is lost, whitened (N, F)."""
        path = self.cache / "cifar-lost.safetensors"
        if not path.is_file():
            save_file({"lost": self.lost_features(self.data, 0)}, path)
        lost = load_file(path)["lost"]
        whitening = Whitening.fit(lost)
        return whitening, whitening(lost)

    @cached_property
    def scores(self) -> Tensor:
        """Scores of all training images."""
        return self.whitened[1].square().sum(1)

    @cached_property
    def labels(self) -> Tensor:
        """Bins of the scores, the rarest split into kinds."""
        path = self.cache / "cifar-labels.safetensors"
        if not path.is_file():
            bins = equal_count_bins(self.scores, 10)
            save_file({"labels": split_rarest(bins, self.whitened[1][bins == 9], PARTS)}, path)
        return load_file(path)["labels"]

    def ranks(self, scores: Tensor, rows: Tensor) -> Row:
        """How often a score puts an image of a rare class above a common one."""
        classes = self.classes[rows]
        common = scores[torch.isin(classes, torch.tensor([*COMMON]))]
        above = lambda label: (scores[classes == label][:, None] > common).double().mean().item()  # noqa: E731
        return {f"AUC {name}": above(label) for label, name in RARE.items()}

    def some(self) -> Tensor:
        """Rows of all rare images and of 1500 common ones."""
        rare = torch.isin(self.classes, torch.tensor([*RARE]))
        common = (~rare).nonzero().flatten()
        picked = common[torch.randperm(len(common), generator=torch.Generator().manual_seed(self.seed))[:1500]]
        return torch.cat([rare.nonzero().flatten(), picked])

    @cached_property
    def chosen_parts(self) -> str:
        """The kinds that a look at their training images would choose: those with the most images of the rare classes."""
        rare = torch.isin(self.classes, torch.tensor([*RARE])).double()
        shares = torch.stack([rare[self.labels == 9 + k].mean() for k in range(PARTS)])
        return "part:" + ",".join(map(str, shares.topk(CHOSEN).indices.tolist()))

    @cached_property
    def missing_parts(self) -> str:
        """The kinds that the model makes least of, by 500 unguided images; no class label is looked at."""
        drawn = self.draw("ddpm", FEW, count=500)
        real = kind_shares(self.classifier, self.data)
        return missing_kinds(real, kind_shares(self.classifier, drawn), CHOSEN)

    @cached_property
    def classifier(self) -> MinorityClassifier:
        path = self.cache / f"cifar-{self.seed}.safetensors"
        if not path.is_file():
            made = MinorityClassifier((3, 16, 16), 10, parts=PARTS, width=32, depth=1, seed=self.seed)
            fit(made, self.data, self.labels, self.noise, FitSettings(**FIT, seed=self.seed))
            made.save(path)
        return MinorityClassifier.load(path)

    @cached_property
    def informed(self) -> MinorityClassifier:
        """A classifier told the rare classes: what guidance reaches once rarity is known, whatever the score."""
        path = self.cache / f"cifar-informed-{self.seed}.safetensors"
        if not path.is_file():
            made = MinorityClassifier((3, 16, 16), 2, parts=len(RARE), width=32, depth=1, seed=self.seed)
            labels = sum((self.classes == label) * (1 + k) for k, label in enumerate(RARE))
            fit(made, self.data, labels, self.noise, FitSettings(**FIT | {"steps": 600}, seed=self.seed))
            made.save(path)
        return MinorityClassifier.load(path)

    def rare(self, x: Tensor) -> Row:
        """Shares of the rare classes according to the judge."""
        with torch.no_grad():
            found = torch.cat([self.judge(part).argmax(1) for part in x.split(512)])
        return {name: (found == label).double().mean().item() for label, name in RARE.items()}

    def measure(self, x: Tensor) -> Row:
        shares = self.rare(x)
        precision = precision_recall(x.flatten(1), self.reference.flatten(1), k=3).precision
        return {**shares, "both": sum(shares.values()), "precision": precision}

    def draw(self, text: str, steps: int, guide: Any = None, count: int | None = None) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * self.seed + 1)
        with swap(self.pipe, text), guide() if guide else nullcontext():
            images = self.pipe(
                batch_size=count or COUNT, num_inference_steps=steps, generator=generator, output_type="np"
            ).images
        return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1

    def rejection(self, candidates: int, text: str, steps: int) -> Tensor:
        """The rarest of several times as many images; what scoring them costs is not counted."""
        drawn = self.draw(text, steps, count=COUNT * candidates)
        return drawn[self.whitened[0](self.lost_features(drawn, 2)).square().sum(1).topk(COUNT).indices]


def rows(seed: int, samplers: list[str], cache: Path, data: Path) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Names of the table's rows and what computes them."""
    cifar = Cifar(seed, cache, data)
    images, labels = _split(data, "test")

    def drawn(text: str, steps: int, label: Callable[[], Any] | None = None, scale: float = 4.0) -> Callable[[], Row]:
        guide = (lambda: minority_guidance(cifar.pipe, cifar.classifier, scale, label())) if label else None
        return lambda: cifar.measure(cifar.draw(text, steps, guide))

    def ranked(snr: float) -> Row:
        picked = cifar.some()
        scorer = cifar.scorer(snr, distance=squared_error)
        return cifar.ranks(cifar._batches(scorer, cifar.data[picked], seed), picked)

    common = torch.isin(labels, torch.tensor([*COMMON]))
    yield "judge on common test images", lambda: cifar.rare(images[common])
    for label, name in RARE.items():
        yield f"judge on test images of {name}", lambda label=label: cifar.rare(images[labels == label])
    for snr in LEVELS:
        yield f"score by squared error, SNR_1 = {snr:g}", lambda snr=snr: ranked(snr)
    every = torch.arange(len(cifar.data))
    yield f"score by whitened features, SNR_1 = {SNR:g}", lambda: cifar.ranks(cifar.scores, every)

    def among(chosen: Tensor) -> Row:
        found = {name: (cifar.classes[chosen] == label).double().mean().item() for label, name in RARE.items()}
        return {**found, "both": sum(found.values())}

    yield "rarest tenth of the data, by features (true labels)", lambda: among(cifar.labels >= 9)
    kinds = lambda: torch.isin(cifar.labels - 9, torch.tensor([int(k) for k in cifar.chosen_parts[5:].split(",")]))  # noqa: E731
    yield "the chosen kinds' training images (true labels)", lambda: among(kinds())
    whole, each = lambda: -1, lambda: "each"
    chosen, missing = lambda: cifar.chosen_parts, lambda: cifar.missing_parts
    yield f"unguided, {STEPS} NFE", drawn("ddpm", STEPS)
    yield f"rejection, 1 of 5, ddpm, {FEW} NFE", lambda: cifar.measure(cifar.rejection(5, "ddpm", FEW))
    for w in (2.0, 4.0):
        yield f"rarest bin, w={w:g}", drawn("ddpm", STEPS, whole, w)
    yield "each kind in turn, w=4", drawn("ddpm", STEPS, each)
    yield f"{CHOSEN} most missing kinds in turn, w=4", drawn("ddpm", STEPS, missing)
    yield f"{CHOSEN} chosen kinds in turn, w=4", drawn("ddpm", STEPS, chosen)
    if seed == 0:
        told = lambda: minority_guidance(cifar.pipe, cifar.informed, 4.0, "each")  # noqa: E731
        yield "classifier told the rare classes, each in turn, w=4", lambda: cifar.measure(cifar.draw("ddpm", STEPS, told))
    for text in samplers:
        name = named(text)
        yield f"unguided, {name}, {FEW} NFE", drawn(text, FEW)
        yield f"rarest bin, w=4, {name}, {FEW} NFE", drawn(text, FEW, whole)
        yield f"{CHOSEN} chosen kinds in turn, w=4, {name}, {FEW} NFE", drawn(text, FEW, chosen)

"""Part 2 of the minority benchmark: handwritten digits with two planted attributes, judged by pixel detectors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from minority_record import Row, named
from torch import Tensor

from samplers import NoiseSchedule
from samplers.denoisers import from_network
from samplers.evaluation import precision_recall
from samplers.guidance import (
    FitSettings,
    MinorityClassifier,
    MinorityScorer,
    boost_and_skip,
    equal_count_bins,
    fit,
    kind_shares,
    minority_guidance,
    missing_kinds,
    self_minority_guidance,
    split_rarest,
)
from samplers.reference import load_folder
from samplers.schedulers import swap

sys.path.insert(0, str(Path(__file__).parent / "models"))
from train_digits_planted import ATTRIBUTES, detect, planted_digits

COUNT, STEPS, FEW, PARTS, DRAWS = 100, 50, 10, 6, 8
FIT = {"steps": 1000, "batch_size": 256, "lr": 2e-3}


class Digits:
    """The planted-digits model with its data, scores and classifier."""

    def __init__(self, seed: int, cache: Path) -> None:
        self.seed, self.cache = seed, cache
        self.pipe = load_folder(Path(__file__).parent / "models" / "digits-planted")
        self.noise = NoiseSchedule.from_config(self.pipe.scheduler.config)
        self.data, self.planted = planted_digits()
        denoiser = from_network(self.pipe.unet, self.noise)
        self.scorer = MinorityScorer(denoiser, self.noise, draws=DRAWS, clip=1.0).calibrated(self.data)

    def _batches(self, one: Callable[..., Tensor], x: Tensor, offset: int) -> Tensor:
        generator = torch.Generator().manual_seed(offset)
        return torch.cat([one(part, generator) for part in x.split(512)])

    @cached_property
    def labels(self) -> Tensor:
        """The bins, the rarest split into parts; scores do not depend on the benchmark's seed and are kept."""
        path = self.cache / "digits-labels.pt"
        if not path.is_file():
            bins = equal_count_bins(self._batches(self.scorer, self.data, 0), 10)
            residuals = self._batches(self.scorer.residuals, self.data[bins == 9], 1)
            torch.save(split_rarest(bins, residuals, PARTS), path)
        return torch.load(path, weights_only=True)

    @cached_property
    def classifier(self) -> MinorityClassifier:
        path = self.cache / f"digits-{self.seed}.safetensors"
        if not path.is_file():
            made = MinorityClassifier((1, 8, 8), 10, parts=PARTS, width=128, depth=2, seed=self.seed)
            fit(made, self.data, self.labels, self.noise, FitSettings(**FIT, seed=self.seed))
            made.save(path)
        return MinorityClassifier.load(path)

    @cached_property
    def chosen_parts(self) -> str:
        """The parts that a look at their training images would choose: those that mostly carry a planted attribute."""
        shares = [
            max(self.planted[name][self.labels == 9 + k].double().mean().item() for name in ATTRIBUTES) for k in range(PARTS)
        ]
        return "part:" + ",".join(str(k) for k in range(PARTS) if shares[k] > 0.5)

    @cached_property
    def missing_parts(self) -> str:
        """The two kinds that the model makes least of, by 500 unguided images; no detector takes part."""
        drawn = self.draw("ddpm", FEW, count=500)
        return missing_kinds(kind_shares(self.classifier, self.data), kind_shares(self.classifier, drawn), 2)

    def draw(self, text: str, steps: int, guide: Any = None, count: int = COUNT) -> Tensor:
        """Images (count, 1, 8, 8) in [-1, 1] from the unmodified pipeline."""
        generator = torch.Generator().manual_seed(1000 * self.seed + 1)
        with swap(self.pipe, text), guide() if guide else nullcontext():
            images = self.pipe(batch_size=count, num_inference_steps=steps, generator=generator, output_type="np").images
        return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1

    def rejection(self, candidates: int, text: str, steps: int) -> Tensor:
        drawn = self.draw(text, steps, count=COUNT * candidates)
        return drawn[self._batches(self.scorer, drawn, 2).topk(COUNT).indices]

    def measure(self, x: Tensor) -> Row:
        found = {name: value.double().mean().item() for name, value in detect(x).items()}
        precision = precision_recall(x.flatten(1), self.data.flatten(1), k=3).precision
        return {**found, "least covered": min(found.values()), "precision": precision}


def rows(seed: int, samplers: list[str], cache: Path) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Names of the table's rows and what computes them."""
    digits = Digits(seed, cache)

    def drawn(text: str, steps: int, make: Callable[[], Any] | None = None) -> Callable[[], Row]:
        return lambda: digits.measure(digits.draw(text, steps, make))

    def guided(**guidance: Any) -> Callable[[], Any]:
        return lambda: minority_guidance(digits.pipe, digits.classifier, **guidance)

    yield "data", lambda: {k: v.double().mean().item() for k, v in digits.planted.items()}
    yield (
        "rarest tenth of the data",
        lambda: {k: v[digits.labels >= 9].double().mean().item() for k, v in digits.planted.items()},
    )
    yield f"unguided, {STEPS} NFE", drawn("ddpm", STEPS)
    for text in ("dpmpp:order=2", "ddpm", *(text for text in samplers if text.endswith(".json"))):
        yield f"rejection, 1 of 5, {named(text)}, {FEW} NFE", lambda text=text: digits.measure(digits.rejection(5, text, FEW))
    for w in (2.0, 4.0, 8.0):
        yield f"rarest bin, w={w:g}", drawn("ddpm", STEPS, guided(scale=w))
    yield "each kind in turn, w=4", drawn("ddpm", STEPS, guided(scale=4.0, label="each"))
    chosen = lambda: minority_guidance(digits.pipe, digits.classifier, 4.0, digits.chosen_parts)  # noqa: E731
    yield "chosen kinds in turn, w=4", drawn("ddpm", STEPS, chosen)
    missing = lambda: minority_guidance(digits.pipe, digits.classifier, 4.0, digits.missing_parts)  # noqa: E731
    yield "two most missing kinds in turn, w=4", drawn("ddpm", STEPS, missing)
    yield "bin 0, w=4", drawn("ddpm", STEPS, guided(scale=4.0, label=0))
    noise = lambda: torch.Generator().manual_seed(seed)  # noqa: E731
    yield (
        "self-guided, w=2, every 5th",
        drawn("ddpm", STEPS, lambda: self_minority_guidance(digits.pipe, 2.0, every=5, generator=noise())),
    )
    yield "Boost-and-Skip, gamma=4, gain 2.5", drawn("ddpm", STEPS, lambda: boost_and_skip(digits.pipe, 4.0, 2.5))
    for text in samplers:
        yield f"unguided, {named(text)}, {FEW} NFE", drawn(text, FEW)
        yield f"rarest bin, w=4, {named(text)}, {FEW} NFE", drawn(text, FEW, guided(scale=4.0))
        yield f"chosen kinds in turn, w=4, {named(text)}, {FEW} NFE", drawn(text, FEW, chosen)
        yield f"two most missing kinds in turn, w=4, {named(text)}, {FEW} NFE", drawn(text, FEW, missing)

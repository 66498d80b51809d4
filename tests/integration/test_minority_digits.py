"""Digits with planted rare attributes, judged by pixel detectors that took no part in training or guiding."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from samplers import NoiseSchedule
from samplers.denoisers import from_network
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

MODELS = Path(__file__).parents[2] / "benchmarks" / "models"
BINS, PARTS, COUNT, STEPS = 10, 6, 100, 25


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, MODELS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def planted() -> SimpleNamespace:
    """The planted set, and which attribute each image has."""
    module = script("train_digits_planted")
    images, attributes = module.planted_digits()
    return SimpleNamespace(images=images, attributes=attributes, detect=module.detect)


@pytest.fixture(scope="module")
def trained(planted) -> SimpleNamespace:
    """Scores, bins split into kinds, and the classifier."""
    pipe = load_folder(MODELS / "digits-planted")
    noise = NoiseSchedule.from_config(pipe.scheduler.config)
    scorer = MinorityScorer(from_network(pipe.unet, noise), noise, draws=4, clip=1.0).calibrated(planted.images)
    generator = torch.Generator().manual_seed(0)
    scores = torch.cat([scorer(part, generator) for part in planted.images.split(512)])
    bins = equal_count_bins(scores, BINS)
    labels = split_rarest(bins, scorer.residuals(planted.images[bins == BINS - 1], generator), PARTS)
    classifier = MinorityClassifier((1, 8, 8), BINS, parts=PARTS, width=128, depth=2)
    fit(classifier, planted.images, labels, noise, FitSettings(steps=800, batch_size=256, lr=2e-3))
    return SimpleNamespace(pipe=pipe, bins=bins, labels=labels, classifier=classifier)


def test_detectors_agree_with_what_was_planted(planted):
    for name, found in planted.detect(planted.images).items():
        assert (found == planted.attributes[name]).double().mean() >= 0.995


@pytest.mark.slow
class TestPlantedAttributes:
    """Standard errors of shares are at most 0.05 (100 images)."""

    def shares(self, planted: Any, trained: Any, text: str = "ddpm", steps: int = STEPS, **guidance: Any) -> dict[str, float]:
        generator = torch.Generator().manual_seed(1)
        guide = minority_guidance(trained.pipe, trained.classifier, **{"scale": 0.0, **guidance})
        with swap(trained.pipe, text), guide:
            images = trained.pipe(batch_size=COUNT, num_inference_steps=steps, generator=generator, output_type="np").images
        x: Tensor = torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1
        return {name: found.double().mean().item() for name, found in planted.detect(x).items()}

    def test_score_puts_both_attributes_into_the_rarest_bin(self, planted, trained):
        for has in planted.attributes.values():
            assert has[trained.bins == BINS - 1].double().mean() >= 4 * has.double().mean()

    def test_parts_are_kinds_of_rarity(self, planted, trained):
        """Each attribute has a part that is mostly it, though no label said so."""
        for has in planted.attributes.values():
            purest = max(has[trained.labels == BINS - 1 + k].double().mean().item() for k in range(PARTS))
            assert purest >= 0.8

    def test_guidance_reaches_what_the_model_leaves_out(self, planted, trained):
        base, guided = self.shares(planted, trained), self.shares(planted, trained, scale=4.0)
        assert base["inverted"] <= 0.05
        assert guided["inverted"] >= 0.35
        assert max(self.shares(planted, trained, scale=4.0, label=0).values()) <= 0.03

    def test_chosen_parts_cover_every_attribute(self, planted, trained):
        """One part for each attribute, as a look at the parts' training images would choose."""
        parts = [
            max(range(PARTS), key=lambda k: has[trained.labels == BINS - 1 + k].double().mean().item())
            for has in planted.attributes.values()
        ]
        label = "part:" + ",".join(map(str, parts))
        found = self.shares(planted, trained, scale=4.0, label=label)
        assert min(found.values()) >= 0.25

    def test_ten_evaluations(self, planted, trained):
        assert self.shares(planted, trained, "dpmpp:order=2", 10, scale=4.0)["inverted"] >= 0.35


def test_the_page_has_the_numbers_of_the_benchmark():
    folder = MODELS.parent
    spec = importlib.util.spec_from_file_location("minority_record", folder / "minority_record.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (folder.parent / "docs" / "minority.md").read_text()
    for part in ("mixture", "digits", "cifar"):
        shown = page.partition(f"<!-- benchmarks/minority.py {part} -->\n")[2].partition("\n<!-- end -->")[0]
        assert shown == module.Record(folder / "results" / f"minority-{part}.json").table()

"""The pipelines that ship: they load, they are small, and they are good enough to measure solvers with."""

from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline
from safetensors.torch import load_file

from samplers import reference
from samplers.evaluation import Conditioning, compare, converged, count_calls, generate, load_pipeline
from samplers.reference.quality import conditional_accuracy, digit_classifier, recognised
from samplers.schedulers import swap


def test_both_load_as_pipelines_and_fit_in_four_megabytes() -> None:
    assert reference.names() == ["digits", "digits-conditional"]
    assert isinstance(reference.load("digits"), DDPMPipeline)
    assert isinstance(reference.load("digits-conditional"), reference.ClassConditionalPipeline)
    folder = Path(reference.__file__).parent / "models"
    files = [path for name in reference.names() for path in (folder / name).rglob("*.safetensors")]
    assert len(files) == 2
    assert sum(path.stat().st_size for path in files) < 4e6
    assert all(tensor.dtype == torch.float16 for path in files for tensor in load_file(path).values())


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown reference pipeline 'digit'; known: digits, digits-conditional"):
        reference.load("digit")


def test_splits_are_disjoint_and_complete() -> None:
    train, test, every = (reference.digit_images(split)[0] for split in ("train", "test", "all"))
    assert len(train) + len(test) == len(every) == 1797
    assert every.min() == -1.0
    assert every.max() == 1.0
    with pytest.raises(ValueError, match="unknown split 'dev'; known: train, test, all"):
        reference.digit_images("dev")


def test_few_steps_of_the_conditional_pipeline_are_recognised() -> None:
    pipe, labels = load_pipeline("digits-conditional"), list(range(10)) * 4
    with swap(pipe, "deis:order=3,grid=lambda,afs=zero_x0"), count_calls(pipe) as count:
        images = generate(pipe, Conditioning(class_labels=labels, guidance=2.0), range(40), steps=6, seed=3)
    assert count.calls == 6
    assert count.largest_batch == 80  # guidance: both halves in one pass
    assert recognised(digit_classifier(), images, labels) >= 0.95


def test_compare_measures_against_the_converged_solution() -> None:
    pipe, batch = load_pipeline("digits"), range(8)
    what = Conditioning()
    target = converged(pipe, what, batch, steps=60)
    results = compare(pipe, what, ["ddim:grid=lambda", {"class": "DDIMScheduler"}], [4, 12], images=batch, reference=target)
    assert [(r.sampler, r.nfe) for r in results] == [
        (name, nfe) for name in ("ddim:grid=lambda", "diffusers DDIMScheduler") for nfe in (4, 12)
    ]
    assert results[1].rmse < results[0].rmse
    assert results[3].rmse < results[2].rmse
    by_hand = 2 * (results[0].images - target).square().mean().sqrt()
    assert results[0].rmse == pytest.approx(by_hand.item())


@pytest.mark.slow
def test_a_classifier_of_real_digits_recognises_the_samples() -> None:
    classifier = digit_classifier()
    images, labels = reference.digit_images("test")
    assert recognised(classifier, (images + 1) / 2, labels.tolist()) > 0.97
    assert conditional_accuracy(load_pipeline("digits-conditional"), steps=100, per_class=20) >= 0.9

"""The torchmetrics-style metrics: same values as the functions, reset, several processes."""

import subprocess
import sys
import textwrap

import pytest

from samplers.evaluation import FrechetReference, kernel_distance, load_extractor, quantise, reference_features
from samplers.evaluation.metrics import FrechetDistance, KernelDistance
from samplers.reference import digit_images


@pytest.fixture(scope="module")
def extractor():
    return load_extractor()


@pytest.fixture(scope="module")
def reference(extractor):
    return reference_features("digits", extractor)


@pytest.fixture(scope="module")
def images():
    return quantise((digit_images("test")[0] + 1) / 2)


early = pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")


@early
def test_frechet(extractor, reference, images):
    metric = FrechetDistance(extractor, reference)
    for part in images.split(50):
        metric.update(part)
    side = FrechetReference.from_features(reference.features, unit_variance=True)
    assert metric.compute().item() == pytest.approx(side.distance_to_features(extractor(images)), rel=1e-5)
    metric.reset()
    with pytest.raises(ValueError, match="at least 2"):
        metric.compute()
    metric.update(images[:50])
    assert metric.compute().item() == pytest.approx(side.distance_to_features(extractor(images[:50])), rel=1e-5)


def test_one_batch_and_all(extractor, reference, images):
    """Called as a function a metric gives the batch's value and keeps counting."""
    metric = FrechetDistance(extractor, reference)
    first = metric(images[:100]).item()
    metric(images[100:])
    whole = FrechetDistance(extractor, reference)
    whole.update(images)
    assert metric.compute().item() == pytest.approx(whole.compute().item(), rel=1e-9)
    assert first > whole.compute().item()


@early
def test_kernel(extractor, reference, images):
    metric = KernelDistance(extractor, reference)
    with pytest.raises(ValueError, match="at least 2"):
        metric.compute()
    for part in images.split(100):
        metric.update(part)
    assert metric.compute().item() == pytest.approx(kernel_distance(extractor(images), reference.features), rel=1e-6)


def test_other_protocols_are_refused(reference):
    for kind in (FrechetDistance, KernelDistance):
        with pytest.raises(ValueError, match="was made with fd-randconv64-v1"):
            kind(load_extractor("fd-pixel"), reference)


@pytest.mark.slow
def test_two_processes(extractor, reference, images, tmp_path):
    """Uneven halves in two gloo processes give what one process gives."""
    script = tmp_path / "worker.py"
    script.write_text(
        textwrap.dedent("""
        import os
        import torch
        from samplers.evaluation import load_extractor, quantise, reference_features
        from samplers.evaluation.metrics import FrechetDistance, KernelDistance
        from samplers.reference import digit_images

        torch.distributed.init_process_group("gloo")
        images = quantise((digit_images("test")[0] + 1) / 2)
        share = images[:101] if os.environ["RANK"] == "0" else images[101:]
        extractor = load_extractor()
        reference = reference_features("digits", extractor)
        metrics = [kind(extractor, reference) for kind in (FrechetDistance, KernelDistance)]
        for metric in metrics:
            metric.update(share)
        values = [metric.compute().item() for metric in metrics]
        if os.environ["RANK"] == "0":
            print("values", *map(repr, values))
        torch.distributed.destroy_process_group()
        """)
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("values"))
    alone = []
    for kind in (FrechetDistance, KernelDistance):
        metric = kind(extractor, reference)
        metric.update(images)
        alone.append(metric.compute().item())
    assert [float(value) for value in line.split()[1:]] == pytest.approx(alone, rel=1e-6)

"""What people complained about in other tools, one test for each: it must not happen here."""

import importlib
import inspect
import sys

import numpy as np
import pytest
import torch

from samplers import evaluation
from samplers.evaluation import FeatureMoments, FixedNfeRun, FrechetReference, Model, frechet_distance, load_extractor
from samplers.evaluation.features.resizing import resize_clean, resize_tf1, resize_torch
from samplers.evaluation.fixed_nfe import Worker, diff


def gaussian(n, d, seed):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def pipe():
    return Model("digits", evaluation.load_pipeline("digits"))


@pytest.fixture(scope="module")
def extractor():
    return load_extractor()


@pytest.fixture(scope="module")
def reference(extractor):
    return evaluation.reference_features("digits:test", extractor)


@pytest.fixture
def run(tmp_path, pipe, extractor, reference):
    def make(name="run", **options):
        return FixedNfeRun(tmp_path / name, [pipe], ["ddim"], [1], extractor, reference, **({"num": 13} | options))

    return make


def test_imaginary_component():
    """pytorch-fid 13, 100, 103: "Imaginary component 1e125" for few images or near-duplicates."""
    features = torch.cat([gaussian(20, 256, 0), gaussian(1, 256, 1).repeat(30, 1) + 1e-9 * gaussian(30, 256, 2)])
    moments = FeatureMoments(256)
    moments.update(features)
    value = FrechetReference.from_features(gaussian(25, 256, 3)).distance_to_moments(moments)
    assert 0 < value < 1e4


def test_scipy_may_change_sqrtm(monkeypatch):
    """MONAI 9076, ignite 3620: sqrtm lost an argument and every FID broke."""
    monkeypatch.setattr("scipy.linalg.sqrtm", None)
    assert frechet_distance(torch.zeros(2), torch.eye(2), torch.zeros(2), 4 * torch.eye(2)) == pytest.approx(2)


def test_resizing_never_changes_silently(extractor):
    """torchmetrics 3130: antialiasing became the default, and with it all values. Each protocol has its own, in its id."""
    ramp = torch.arange(4.0).reshape(1, 1, 1, 4).expand(1, 3, 4, 4)
    row = [resize(ramp)[0, 0, 0] for resize in (resize_tf1, resize_torch, resize_clean)]
    assert row[0][150].item() == pytest.approx(150 * 4 / 299, rel=1e-6)  # no half-pixel shift
    assert row[1][150].item() == pytest.approx(150.5 * 4 / 299 - 0.5, rel=1e-6)
    assert row[2].min() >= 0
    assert (row[2] - row[1]).abs().max() > 0.05
    assert ":antialias-32:uint8-round" in extractor.protocol.id


def test_single_precision_and_ranges(extractor):
    """torcheval 192 and 220, ignite 2423: float32 sums and images of the wrong range gave values off by up to 1e5."""
    offset = 1000.0
    x, y = gaussian(500, 16, 0) + offset, gaussian(500, 16, 1) + offset
    exact = FrechetReference.from_features(x.double()).distance_to_features(y.double())
    moments = [FeatureMoments(16), FeatureMoments(16)]
    for m, side in zip(moments, (x, y), strict=True):
        for part in side.split(7):
            m.update(part)
    value = frechet_distance(moments[0].mean, moments[0].cov, moments[1].mean, moments[1].cov)
    assert value == pytest.approx(exact, rel=1e-9)
    for images in (torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8) * 255, torch.zeros(2, 3, 8, 8, dtype=torch.int64)):
        with pytest.raises(ValueError, match="uint8"):
            extractor(images)


def test_precision_is_of_the_generated():
    """torch-fidelity 58 and 66: precision and recall were swapped."""
    real = torch.cat([gaussian(60, 4, 0), gaussian(60, 4, 1) + 40])
    result = evaluation.precision_recall(generated=gaussian(60, 4, 2), reference=real)
    assert result.precision > 0.7 > 0.55 > result.recall


def test_no_process_waits_for_another(run):
    """torchmetrics 2684: compute hung when not every process called it. Here processes share only a folder."""
    job = run(worker=Worker(rank=1, world=4), shard_size=2)
    job.sample()
    assert job.score() == []
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("world", [1, 2, 3, 8, 40])
def test_many_devices(run, world):
    """pytorch-fid 73, k-diffusion 7: several devices must share the sampling; every shard is done once."""
    shards = list(range(len(run(shard_size=2).shards())))
    shares = [Worker(rank, world).share(shards) for rank in range(world)]
    assert sorted(shard for share in shares for shard in share) == shards
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert Worker(3, 4, local=1).device("cuda") == "cuda:1"


@pytest.mark.parametrize("batch", [1, 4, 13, 50])
def test_exactly_as_many_images_as_asked(run, batch):
    """ermongroup/ddim 3, 5, 32: 49 984 images instead of 50 000, because batches were dropped; schedules not recorded."""
    job = run(batch_size=batch, shard_size=5)
    job.sample()
    assert sum(len(job.folder(job.cells[0]).read(seeds).features) for seeds in job.shards()) == 13
    record = job.score()[0]
    assert record["n"] == 13
    assert job.cells[0].settings["schedule"]["schedule"]["times"]


def test_adm_reference(tmp_path, extractor):
    """LTH14/mar 8 and 93: what is in the reference file, and which part of it counts? No fork is needed to use it."""
    sigma = np.eye(64)
    np.savez(
        tmp_path / "adm.npz", mu=np.ones(64), sigma=sigma, mu_s=np.zeros(9), sigma_s=np.eye(9), arr_0=np.zeros((1, 2, 2, 3))
    )
    loaded = evaluation.load_reference(tmp_path / "adm.npz", extractor.protocol, declared="fd-randconv64-v1")
    assert loaded.moments.mean.tolist() == [1.0] * 64


def test_no_tensorflow():
    """guided-diffusion 159: the evaluator needed TensorFlow."""
    importlib.import_module("samplers.evaluation.metrics")
    importlib.import_module("samplers.evaluation.features.inception")
    assert "tensorflow" not in sys.modules


def test_offline(tmp_path, monkeypatch):
    """stylegan2-ada-pytorch 234: how does it run without a network? The message says which file, how large, and where to."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("FEWSTEP_INCEPTION_WEIGHTS", raising=False)
    monkeypatch.setattr("torch.hub.download_url_to_file", None)
    with pytest.raises(FileNotFoundError, match=rf"95\.6 MB.*put it into {tmp_path}.*--weights or FEWSTEP_INCEPTION_WEIGHTS"):
        load_extractor("fid-tf", offline=True)
    assert load_extractor().protocol.weights == load_extractor().protocol.weights


def test_order_of_images_does_not_matter(run):
    """IQA-PyTorch 188: the second decimal differed between servers. The distance itself is exact, and records say versions."""
    x, y = gaussian(400, 32, 0), gaussian(300, 32, 1)
    values = []
    for seed in range(3):
        order = torch.randperm(300, generator=torch.Generator().manual_seed(seed))
        values.append(FrechetReference.from_features(x).distance_to_features(y[order]))
    assert values == pytest.approx([values[0]] * 3, rel=1e-11)
    job = run()
    job.sample()
    record = job.score()[0]
    assert {"python", "torch", "diffusers"} <= record["versions"].keys()
    assert record["machine"]["processor"]


def test_seeds_are_part_of_the_number(run):
    """AutoDiffusion 8: seeds and numbers of images of the search differed from the reported ones."""
    jobs = [run("a"), run("b", seed=13)]
    for job in jobs:
        job.sample()
    first, second = (job.score() for job in jobs)
    assert first[0]["seeds"] == [[0, 13]]
    assert not diff(first, second)[0]["same_seeds"]
    assert "generator" in inspect.signature(evaluation.kernel_distance_subsets).parameters

"""Runs at fixed NFE: what they count, that they resume, and that batches and processes change nothing."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from samplers.commands.fid import app
from samplers.evaluation import Conditioning, FixedNfeRun, Model, load_extractor, load_pipeline, reference_features
from samplers.evaluation.fixed_nfe import Worker, diff, estimate, read_results, write_tables


@pytest.fixture(scope="module")
def extractor():
    return load_extractor()


@pytest.fixture(scope="module")
def reference(extractor):
    return reference_features("digits", extractor)


@pytest.fixture(scope="module")
def models():
    return {name: Model(name, load_pipeline(name)) for name in ("digits", "digits-conditional")}


@pytest.fixture
def make(tmp_path, models, extractor, reference):
    """A run of 11 images at 2 evaluations in shards of 4, with changes."""

    def run(name="run", model="digits", **changes):
        options = {"samplers": ["ddim"], "nfes": [2], "num": 11, "shard_size": 4, "batch_size": 3, "extractor": extractor}
        return FixedNfeRun(tmp_path / name, [models[model]], reference=reference, **(options | changes))

    return run


def features(run, cell=0):
    cell = run.cells[cell]
    return torch.cat([run.folder(cell).read(seeds).features for seeds in run.shards()])


def test_record_says_how_it_was_made(make):
    metrics = ("frechet", "kernel", "prdc", "sw2", "energy", "infinity")
    run = make(samplers=["ddim", "unipc:order=3"], nfes=[2, 3], metrics=metrics, num=30, repeats=2, batch_size=30)
    run.sample()
    records = run.score()
    assert [(r["sampler"], r["nfe"]) for r in records] == [("ddim", 2), ("ddim", 3), ("unipc:order=3", 2), ("unipc:order=3", 3)]
    record = records[0]
    assert (record["nfe_counted"], record["passes"], record["n"], record["repeats"]) == (2, 1, 30, 2)
    assert record["seeds"] == [[0, 30], [30, 60]]
    assert record["floor"]["n"] == 30
    assert record["std"]["fd"] > 0
    assert record["mean"]["fd"] == pytest.approx(sum(v["fd"] for v in record["values"]) / 2)
    assert {"fd_inf", "kd", "precision", "sw2", "energy"} <= record["mean"].keys()
    assert "fid" not in json.dumps(record["mean"])
    assert run.score() == records
    assert len((run.out / "results.jsonl").read_text().splitlines()) == 4
    write_tables(run.out, records)
    assert "| ddim |" in (run.out / "table.md").read_text()
    assert len((run.out / "table.csv").read_text().splitlines()) == 1 + sum(len(r["mean"]) for r in records)


def test_batches_and_workers_change_nothing(make):
    one = make("one")
    one.sample()
    several = make("several")
    for rank in (1, 0, 2):
        replace(several, worker=Worker(rank, 3)).sample()
    assert several.missing() == []
    torch.testing.assert_close(features(several), features(one), rtol=0, atol=0)
    other = make("batches", batch_size=2, shard_size=11)
    other.sample()
    torch.testing.assert_close(features(other), features(one), rtol=1e-4, atol=1e-5)
    assert other.score()[0]["mean"]["fd"] == pytest.approx(one.score()[0]["mean"]["fd"], rel=1e-4)


def test_only_missing_shards_are_made(make):
    run = make()
    run.sample()
    whole = features(run)
    files = [run.folder(run.cells[0]).file(seeds) for seeds in run.shards()]
    assert [f.name for f in files] == ["000000000-000000004.npz", "000000004-000000008.npz", "000000008-000000011.npz"]
    files[1].unlink()
    times = [f.stat().st_mtime_ns for f in files if f.exists()]
    made = []
    run.sample(lambda what, images: made.append(images))
    assert sum(made) == 4
    assert [f.stat().st_mtime_ns for i, f in enumerate(files) if i != 1] == times
    torch.testing.assert_close(features(run), whole, rtol=0, atol=0)
    longer = make(num=12)
    longer.sample(lambda what, images: made.append(images))
    assert sum(made) == 4 + 4  # only the last, incomplete shard is made again


def test_guidance_passes_are_reported_apart(make):
    run = make(model="digits-conditional", conditioning=Conditioning(guidance=2.0), samplers=["dpmpp"], num=4)
    run.sample()
    record = run.score()[0]
    assert (record["nfe_counted"], record["passes"]) == (2, 2)


def test_evaluations_are_counted_not_assumed(make):
    """Heun makes two evaluations for each step but the last, whatever it is asked for."""
    run = make(model="digits-conditional", samplers=["diffusers:HeunDiscreteScheduler", "heun"], nfes=[5], num=3)
    run.sample()
    assert [record["nfe_counted"] for record in run.score()] == [9, 5]


def test_sampling_does_not_wait_for_features(make, extractor):
    """The features of the first batch take until the fourth batch is sampled."""
    fourth, seen = threading.Event(), []

    class Slow:
        protocol = extractor.protocol

        def __call__(self, images):
            assert fourth.wait(60), "sampling waited for features"
            return extractor(images)

    def progress(what, images):
        seen.append(images)
        if len(seen) == 4:
            fourth.set()

    run = make(extractor=Slow(), num=15, shard_size=15)
    run.sample(progress)
    assert seen == [3] * 5
    again = make("again", num=15, shard_size=15)
    again.sample()
    torch.testing.assert_close(features(run), features(again), rtol=0, atol=0)


def test_broken_features_stop_the_run(make, extractor):
    class Broken:
        protocol = extractor.protocol

        def __call__(self, images):
            return extractor(images) * torch.nan

    run = make(extractor=Broken())
    with pytest.raises(ValueError, match="not finite"):
        run.sample()
    assert len(run.missing()) == 3


def test_divergence_names_the_sampler(make, monkeypatch):
    monkeypatch.setattr("samplers.evaluation.fixed_nfe.sampling.generate", lambda *_, **__: torch.full((3, 1, 8, 8), torch.inf))
    with pytest.raises(ValueError, match="ddim at 2 evaluations diverged"):
        make().sample()


def test_begin_afresh(make):
    run = make()
    run.sample()
    first = run.score()[0]
    run.clear()
    assert len(run.missing()) == 3
    run.sample()
    second = run.score(again=True)[0]
    assert second["mean"] == first["mean"]
    assert len((run.out / "results.jsonl").read_text().splitlines()) == 2
    assert read_results(run.out) == [second]
    with pytest.raises(ValueError, match="2 processes"):
        replace(run, worker=Worker(0, 2)).clear()


def test_estimate_counts_what_is_missing(make):
    run = make(nfes=[2, 4])
    assert [(row["images"], row["forwards"]) for row in estimate(run)] == [(11, 22), (11, 44)]
    assert not run.out.exists()
    run.sample()
    assert [row["forwards"] for row in estimate(run)] == [0, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samplers": ["ddim", "ddim"]}, "named twice: ddim"),
        ({"samplers": ["nonsense"]}, "nonsense"),
        ({"samplers": ["diffusers:UNet2DModel"]}, "no scheduler UNet2DModel"),
        ({"samplers": ["diffusers:HeunDiscreteScheduler"]}, "no generator"),
        ({"samplers": []}, "no sampler"),
        ({"nfes": [0]}, "NFE"),
        ({"num": 1}, "num 1"),
        ({"metrics": ["fid50k"]}, "unknown metric 'fid50k'"),
        ({"metrics": []}, "no metrics"),
        ({"metrics": ["clip-score"]}, "needs prompts"),
        ({"conditioning": Conditioning(guidance=2.0)}, "--guidance"),
    ],
)
def test_refused_before_anything_runs(make, changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)
    assert not make().out.exists()


def test_killed_while_writing(make):
    """A half-written line and a half-written shard are as if they were not there."""
    run = make()
    run.sample()
    value = run.score()[0]["mean"]
    path = run.out / "results.jsonl"
    path.write_text(path.read_text()[:40])
    (run.folder(run.cells[0]).path / "000000000-000000004.npz.99.part").write_bytes(b"PK")
    assert run.missing() == []
    assert run.score()[0]["mean"] == value
    assert read_results(run.out)[0]["mean"] == value


def test_diff(make):
    first, second = make("a", nfes=[2, 3]), make("b", seed=100, samplers=["ddim"])
    for run in (first, second):
        run.sample()
    rows = diff(first.score(), second.score())
    assert {(row["sampler"], row["nfe"]) for row in rows} == {("ddim", 2)}
    assert not rows[0]["same_seeds"]
    more = make("c", num=12)
    more.sample()
    with pytest.raises(ValueError, match="number of images 11 against 12"):
        diff(first.score(), more.score())


COMMAND = ["run", "--sampler", "ddim", "--nfe", "3,4", "--num", "300", "--ref", "digits", "--shard", "20", "--batch-size", "10"]


@pytest.mark.slow
def test_killed_processes_lose_nothing(tmp_path):
    """Two processes, one killed with -9 in the middle, the rest by one process: the same bytes as without all that."""
    out = tmp_path / "killed"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "--", "fewstep", "fid"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen([*torchrun, *COMMAND, "--out", str(out)], env=environment, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 300
        while len(list(out.glob("shards/*/*.npz"))) < 3 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout.split()
        os.kill(int(children[0]), signal.SIGKILL)
        assert process.wait(timeout=120) != 0
    before = {path: path.stat().st_mtime_ns for path in out.glob("shards/*/*.npz")}
    assert 3 <= len(before) < 30
    for folder in (out, tmp_path / "whole"):
        result = CliRunner().invoke(app, [*COMMAND, "--out", str(folder)])
        assert result.exception is None, result.output
    files = sorted(path.relative_to(out) for path in out.glob("shards/*/*.npz"))
    assert len(files) == 30
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for name in files:
        with np.load(out / name) as one, np.load(tmp_path / "whole" / name) as other:
            assert one["features"].tobytes() == other["features"].tobytes()
            assert one["images"].tobytes() == other["images"].tobytes()
    values = [[record["mean"] for record in read_results(folder)] for folder in (out, tmp_path / "whole")]
    assert values[0] == values[1]

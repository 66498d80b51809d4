"""``fewstep fid`` from the first reference to the comparison of two runs."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from samplers.commands.fid import app


@pytest.fixture
def fid():
    runner = CliRunner()

    def call(*arguments, error=None):
        result = runner.invoke(app, [str(a) for a in arguments])
        if error is not None:
            assert isinstance(result.exception, ValueError | FileNotFoundError), result.exception
            assert error in str(result.exception)
        else:
            assert result.exception is None, result.output
        return result.stdout

    return call


RUN = ("run", "--sampler", "ddim", "--sampler", "unipc", "--num", 20, "--batch-size", 20, "--ref", "digits")


def test_the_whole_way(fid, tmp_path):
    table = fid(*RUN, "--nfe", "2,3", "--out", tmp_path / "a")
    assert "| sampler | NFE 2 | NFE 3 |" in table
    assert "FD (random-conv features, not FID), 20 images" in table
    names = {"results.jsonl", "table.md", "table.csv", "plot.png", "plot.svg", "report.html", "shards", "references"}
    assert names <= {path.name for path in (tmp_path / "a").iterdir()}
    (tmp_path / "a/table.md").unlink()
    assert fid("table", tmp_path / "a") == table
    assert fid("table", tmp_path / "a", "--csv").startswith("model,sampler,nfe,nfe_counted,passes,metric,mean,std")
    records = json.loads(fid("table", tmp_path / "a", "--json"))
    assert len(records) == 4
    (tmp_path / "a/plot.png").unlink()
    assert "report.html" in fid("plot", tmp_path / "a")
    assert (tmp_path / "a/plot.png").is_file()

    fid(*RUN, "--nfe", "2", "--seed", 20, "--save-images", "--out", tmp_path / "b")
    assert len(list((tmp_path / "b/images").rglob("*.png"))) == 40
    rows = json.loads(fid("diff", tmp_path / "a", tmp_path / "b", "--json"))
    assert {row["sampler"] for row in rows} == {"ddim", "unipc"}
    assert "| digits | ddim | 2 | fd |" in fid("diff", tmp_path / "a", tmp_path / "b")

    fid(*RUN, "--nfe", "2", "--protocol", "fd-pixel", "--out", tmp_path / "c")
    fid("diff", tmp_path / "a", tmp_path / "c", error="cannot be compared: protocol")


def test_a_reference_file_serves_a_run(fid, tmp_path):
    line = fid("ref", "digits", "--out", tmp_path / "ref.npz")
    assert "1437 images, 64 features, fd-randconv64-v1:" in line
    named = fid("run", "--sampler", "ddim", "--nfe", 2, "--num", 20, "--ref", tmp_path / "ref.npz", "--out", tmp_path / "a")
    direct = fid("run", "--sampler", "ddim", "--nfe", 2, "--num", 20, "--ref", "digits", "--out", tmp_path / "b")
    assert named.splitlines()[-4:] == direct.splitlines()[-4:]
    run = ("run", "--sampler", "ddim", "--nfe", 2, "--num", 20, "--out", tmp_path / "c", "--ref")
    fid(*run, tmp_path / "ref.npz", "--protocol", "fd-pixel", error="was made with fd-randconv64-v1")
    np.savez(tmp_path / "foreign.npz", mu=np.zeros(64), sigma=np.eye(64))
    fid(*run, tmp_path / "foreign.npz", error="--ref-protocol fd-randconv64-v1")
    declared = (*run, tmp_path / "foreign.npz", "--ref-protocol", "fd-randconv64-v1")
    fid(*declared, error="kernel needs the features of real images")
    assert not (tmp_path / "c/shards").exists()
    assert "not FID" in fid(*declared, "--metrics", "frechet")


def test_dry_run_writes_no_samples(fid, tmp_path):
    text = fid(*RUN, "--nfe", "2,3", "--out", tmp_path / "a", "--dry-run")
    assert "in all: 200 network passes" in text
    assert not (tmp_path / "a/shards").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--nfe", "2", "--ref", "nowhere"), "no images at 'nowhere'"),
        (("--nfe", "two", "--ref", "digits"), "--nfe 'two'"),
        (("--nfe", "2", "--ref", "digits", "--protocol", "fid"), "unknown protocol 'fid'"),
        (("--nfe", "2", "--ref", "digits", "--protocol", "fid-tf", "--offline"), "put it into"),
        (("--nfe", "2", "--ref", "digits", "--metrics", "clip-score", "--offline"), "clip-vit"),
        (("--nfe", "2", "--ref", "stats.pkl"), "pickle"),
    ],
)
def test_bad_input(fid, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.chdir(tmp_path)
    fid("run", "--sampler", "ddim", "--num", 4, "--out", tmp_path / "a", *arguments, error=message)
    assert not (tmp_path / "a").exists()

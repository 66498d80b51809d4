"""``fewstep distill`` end to end, on laws small enough for seconds."""

import json

import pytest
from typer.testing import CliRunner

from distill.cli import app
from distill.config import read_config
from samplers.discrete import DiscreteTable

LAW = {"law": {"name": "markov", "process": "uniform", "vocab": 3, "length": 3}, "target": "law", "nfe": [2, 3], "budget": 5}


def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=True)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LAW))
    return path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_run_then_eval(config, tmp_path):
    out = tmp_path / "out"
    done = call("run", config, "--out", out, "--json")
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert {row["sampler"] for row in rows} >= {"tweedie 2", "tweedie 9", "learned 2", "learned 3"}
    scores = {row["sampler"]: row["kl"] for row in rows}
    assert scores["learned 2"] < 0.7 * scores["tweedie 2"]
    assert (out / "report.png").stat().st_size > 10_000
    table = DiscreteTable.load(out / "nfe-2.json")
    assert table.nfe == 2
    assert table.provenance["objective"] == "exact_kl"
    before = (out / "nfe-2.json").stat().st_mtime_ns
    again = call("run", config, "--out", out, "--nfe", "2,4")
    assert again.exit_code == 0, again.output
    assert (out / "nfe-2.json").stat().st_mtime_ns == before
    assert read_config(out / "config.json").nfe == [2, 3, 4]
    judged = call("eval", out)
    assert judged.exit_code == 0, judged.output
    assert "learned 4" in judged.stdout


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({"speed": 1}, (), "unknown field `speed`"),
        ({"nfe": [2, 2]}, (), "different numbers"),
        ({"model": "digits"}, (), "either a model or a law"),
        ({"law": {"name": "zipf"}}, (), "known: markov"),
        ({"target": "data"}, (), "'law' or 'teacher'"),
        ({}, ("--nfe", "two"), "whole numbers"),
        ({}, ("--model", "gpt"), "binary-digits-masked"),
        ({}, ("--objective", "fid"), "known: auto"),
    ],
)
def test_bad_input_is_named(config, tmp_path, change, arguments, message):
    config.write_text(json.dumps(LAW | change))
    failed = call("run", config, "--out", tmp_path / "out", *arguments)
    assert failed.exit_code != 0
    assert message in str(failed.exception)


def test_missing_things_are_named(tmp_path, config):
    assert "markov-uniform" in str(call("run", "nothing").exception)
    assert "has no config.json" in str(call("eval", tmp_path / "none").exception)
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "config.json").write_text(config.read_text())
    assert "no table for NFE 2, 3" in str(call("eval", tmp_path / "part").exception)
    other = tmp_path / "other.json"
    other.write_text(json.dumps(LAW | {"seed": 5, "objective": "fid"}))
    for _ in range(2):  # a run that failed before it made anything does not keep its folder
        assert "known: auto" in str(call("run", other, "--out", tmp_path / "part").exception)
    (tmp_path / "part" / "nfe-2.json").write_text("{}")
    other.write_text(json.dumps(LAW | {"seed": 5}))
    assert "another run" in str(call("run", other, "--out", tmp_path / "part").exception)


def test_shipped_configs_are_sound():
    listed = call("run", "--list").stdout.split()
    assert {"digits-masked", "digits-uniform", "markov-uniform"} <= set(listed)
    from distill.cli import _shipped
    from distill.config import problem_of

    for path in _shipped().values():
        problem = problem_of(read_config(path))
        assert problem.seq_len > 1

"""``fewstep search`` from the first command to the exported schedule, on the reference pipeline."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fewstep import app
from samplers import SolverSchedule

SMALL = ["--model", "digits", "--noises", "2", "--reference-nfe", "20", "--baselines", "2", "--batch-size", "4"]


def _json(*arguments: object) -> dict | list:
    outcome = CliRunner().invoke(app, ["search", *map(str, arguments), "--json"], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    return json.loads(outcome.stdout)


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    plan = _json("run", "--nfe", 3, "--out", tmp_path / "x.json", "--trials", 10, *SMALL, "--dry-run")
    assert plan["forwards"]["10 trials x 2 noises x 3"] == 60
    assert plan["total_forwards"] == sum(plan["forwards"].values())
    assert plan["hours_sd_size_assumed"] > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_run_status_best_export(tmp_path: Path) -> None:
    out, report = tmp_path / "found.json", tmp_path / "report.html"
    run = ["run", "--nfe", 3, "--out", out, "--trials", 5, *SMALL, "--refine", 2, "--report", report]
    told = CliRunner().invoke(app, ["search", *map(str, run)], catch_exceptions=False)  # as a person would run it
    first = _json(*run)
    blurred = first["reference_error"] > 0.25 * first["found"]["value"]  # 20 evaluations are far from converged
    assert blurred == ("raise --reference-nfe" in " ".join(told.stderr.split()))
    found = SolverSchedule.load(out)
    assert found.nfe == 3
    assert found.provenance["scores"]["found"]["value"] == pytest.approx(first["found"]["value"])
    assert found.provenance["found_by"]["trials"] == 5
    assert first["ratio"] > 0
    page = report.read_text()
    assert page.count("<h2>") == 6
    assert page.count("data:image/png") >= 3
    storage = f"sqlite:///{tmp_path / 'found.db'}"
    (row,) = _json("status", "--storage", storage)
    assert (row["complete"], row["running"], row["fail"]) == (5, 0, 0)
    best = _json("best", "--storage", storage, "--top", 2)
    assert [entry["value"] for entry in best] == sorted(entry["value"] for entry in best)
    assert best[0]["value"] == row["best"]
    again = _json(*run)  # resumes: nothing is left to do but to select and refine
    assert again["found"] == first["found"]
    exported = tmp_path / "exported.json"
    outcome = CliRunner().invoke(
        app, ["search", "export", "--storage", storage, "--out", str(exported)], catch_exceptions=False
    )
    assert outcome.exit_code == 0
    assert SolverSchedule.load(exported).digest == SolverSchedule.from_dict(best[0]["schedule"]).digest


def test_refusals(tmp_path: Path) -> None:
    for arguments, message in (
        (["run", "--nfe", "3", "--out", str(tmp_path / "x"), "--strategy", "best"], "known: s3"),
        (["run", "--nfe", "3", "--out", str(tmp_path / "x"), "--guidance", "1,much"], "comma-separated numbers"),
        (["status", "--storage", str(tmp_path / "none.db")], "no study file"),
    ):
        outcome = CliRunner().invoke(app, ["search", *arguments])
        assert isinstance(outcome.exception, ValueError | FileNotFoundError)
        assert message in str(outcome.exception)

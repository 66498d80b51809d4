"""The solver benchmark on a tiny problem: it resumes, chooses grids on one set of noises and reports on another."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from samplers.denoisers import GaussianMixture

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    import solver_problems
    import solver_report
    import solvers

    def tiny() -> object:
        g = torch.Generator().manual_seed(0)
        law = GaussianMixture(torch.randn(3, 4, generator=g), torch.tensor([0.3, 0.2, 0.4]))
        denoiser = law.denoiser(solver_problems.NOISE)
        real = law.sample(64, g)
        return solver_problems.Problem("mixture-64d", "Tiny mixture", "Three.", denoiser, (4,), real, 8, 16, 60, torch.float64)

    monkeypatch.setattr(solvers, "problems", lambda file: {"mixture-64d": tiny})
    for module in (solvers, solver_report):
        monkeypatch.setattr(module, "NFES", (4, 5, 8))
        monkeypatch.setattr(module, "GRID_NAMES", ("linspace", "karras", "gits"))
        monkeypatch.setattr(module, "RECIPES", ("ddim", "heun", "unipc:order=3", "ddpm"))
        monkeypatch.setattr(module, "CLASSES", {name: solvers.CLASSES[name] for name in ("DDIM", "Heun", "DDPM")})
    monkeypatch.setattr(solver_report, "PAGE", tmp_path / "page.md")
    yield solvers
    for name in ("solvers", "solver_problems", "solver_report"):
        sys.modules.pop(name, None)


def test_runs_resume_and_report(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger.jsonl"
    bench.run(None, path, [])
    lines = path.read_text().splitlines()
    assert len(lines) == 3 * (4 * 3) + 3 * (3 + 4) + 1  # screen, report with one grid a recipe, the floor
    ledger = bench.read_ledger(path)
    ran: list[str] = []
    original: Callable[..., dict] = bench.Bench.run

    def spy(self: object, job: object) -> dict:
        ran.append(job.key)
        return original(self, job)

    monkeypatch.setattr(bench.Bench, "run", spy)
    bench.run(None, path, [])
    assert ran == []
    path.write_text("\n".join(lines[:-4]) + "\n" + lines[-4][:20])  # killed while writing
    bench.run(None, path, [])
    assert len(ran) == 3
    again = bench.read_ledger(path)
    assert again == ledger

    import solver_report

    solver_report.write_page(again)
    page = (tmp_path / "page.md").read_text()
    assert "## Tiny mixture" in page
    assert "| `unipc:order=3` |" in page
    assert "8 noises to choose grids, 16 to report" in page
    rmse, distance = page.split("Sliced Wasserstein-2 distance to real samples:")
    assert "`ddpm`" not in rmse.split("## Tiny mixture")[1]
    assert "`ddpm`" in distance


def test_numbers_are_what_they_say(bench: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    bench.run(None, path, [])
    ledger = bench.read_ledger(path)
    ddim = ledger["mixture-64d|screen|ddim|linspace|8"]
    own = bench.Bench(bench.problems(None)["mixture-64d"]())
    x, solution = own.solution("screen")
    schedule = bench.parse_recipe("ddim:grid=linspace").schedule(bench.NOISE, 8)
    out = bench.sample(own.problem.denoiser, x, schedule, bench.NOISE)
    assert ddim["rmse"] == pytest.approx(float((out - solution).square().mean().sqrt()), rel=1e-4)
    assert ledger["mixture-64d|report|Heun|diffusers|8"]["nfe_used"] == 7  # never more than were asked for
    assert not torch.equal(own.noises("screen")[:8], own.noises("report")[:8])
    chosen = bench.chosen_grid(ledger, "mixture-64d", "unipc:order=3", 5)
    values = {g: ledger[f"mixture-64d|screen|unipc:order=3|{g}|5"]["rmse"] for g in bench.GRID_NAMES}
    assert chosen == min(values, key=values.__getitem__)


def test_unknown_problems_and_broken_ledgers_are_named(bench: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="unknown problems nothing; with these options there are: mixture-64d"):
        bench.run(None, tmp_path / "ledger.jsonl", ["nothing"])
    path = tmp_path / "broken.jsonl"
    path.write_text('{"key": "a", "rmse": 1}\nnot json\n' + json.dumps({"key": "b"}) + "\n")
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        bench.read_ledger(path)

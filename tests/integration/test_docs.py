"""The README, the generated page, the notebook: what they show exists, runs, and has the numbers they print."""

import ast
import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
import torch
from typer.testing import CliRunner

import fewstep
from samplers import RECIPES, evaluation

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks" / "results").glob("*.md")])
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
DEMO = json.loads((ROOT / "docs" / "images" / "demo.json").read_text())
CONFIG = json.loads((ROOT / "configs" / "demo.json").read_text())


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_solvers_page_has_the_recipes_as_they_are(build: ModuleType) -> None:
    assert build.main(["--check", "--names"]) == 0
    for name in RECIPES:
        assert f"\n## {name}\n" in build.PAGE.read_text()


def test_a_stale_page_is_noticed(build: ModuleType) -> None:
    page = build.PAGE.read_text()
    row = next(line for line in page.splitlines() if build.MEASURED.search(line))
    number = build.MEASURED.search(row)[0]
    near, far = (row.replace(number, f"{float(number) + shift:.2f}") for shift in (0.09, 0.5))
    assert build.differences(page, page.replace(row, near), build.TOLERANCE) == []
    assert build.differences(page, page.replace(row, far), build.TOLERANCE) != []
    assert build.differences(page, page.replace("## ddim", "## dim"), float("inf")) != []


@pytest.mark.slow
def test_the_solvers_page_has_the_measured_orders(build: ModuleType) -> None:
    assert build.main(["--check"]) == 0


def test_the_code_in_the_readme_runs() -> None:
    scope: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), scope)
    assert isinstance(scope["x"], torch.Tensor)
    assert scope["x"].shape == (1000, 1)


def test_the_commands_in_the_readme_exist() -> None:
    commands = [shlex.split(line) for block in blocks("sh") for line in block.splitlines() if line.startswith("fewstep")]
    assert {command[1] for command in commands} == {
        *("demo", "sample", "schedule", "doctor", "fid", "search", "distill", "minority"),
    }
    for command in commands:
        words = command[1 : 2 if command[1] in ("demo", "sample", "doctor") else 3]
        done = CliRunner().invoke(fewstep.app, [*words, "--help"], env={"COLUMNS": "200"})
        assert done.exit_code == 0, command
        missing = [word for word in command if word.startswith("--") and word not in done.output]
        assert not missing, f"{' '.join(command)}: no option {missing}"


def anchors(text: str) -> set[str]:
    """The headings of a page as links name them: lower case, hyphens for spaces, no other punctuation."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in anchors(text), target
        elif not target.startswith("https://"):
            file, _, section = target.partition("#")
            assert (path.parent / file).exists(), target
            assert not section or section in anchors((path.parent / file).read_text()), target


def test_the_readme_has_the_numbers_of_the_demo() -> None:
    rows = {(row["sampler"], row["nfe"]): row["rmse"] for row in DEMO["results"]}
    for sampler in dict.fromkeys(sampler for sampler, _ in rows):
        cells = " | ".join(f"{rows[sampler, nfe]:.4f}" if (sampler, nfe) in rows else "-" for nfe in CONFIG["nfe"])
        assert f"| {sampler} | {cells} |" in README
    assert {key: DEMO[key] for key in ("model", "guidance", "images")} == {
        key: CONFIG[key] for key in ("model", "guidance", "images")
    }


def test_the_readme_has_the_numbers_of_the_benchmark() -> None:
    shown = README.partition("<!-- benchmarks/step_time.py -->")[2].partition("<!-- end -->")[0]
    rows = [line for line in shown.splitlines() if line.startswith("|") and "(" in line]
    results = (ROOT / "benchmarks" / "results" / "step_time.md").read_text()
    assert len(rows) == 6
    assert not [row for row in rows if row not in results]


@pytest.mark.slow
def test_the_numbers_of_the_demo_are_reproduced() -> None:
    pipe, nfe, images = evaluation.load_pipeline(DEMO["model"], offline=True), CONFIG["nfe"][0], range(DEMO["images"])
    what, seed = evaluation.Conditioning(guidance=DEMO["guidance"]), DEMO["seed"]
    reference = evaluation.converged(pipe, what, images, steps=CONFIG["reference_nfe"], seed=seed)
    results = evaluation.compare(pipe, what, CONFIG["samplers"], [nfe], images=images, reference=reference, seed=seed)
    expected = {row["sampler"]: row["rmse"] for row in DEMO["results"] if row["nfe"] == nfe}
    assert {result.sampler: result.rmse for result in results} == pytest.approx(expected, rel=0.02)


def test_the_picture_is_small() -> None:
    assert (ROOT / "docs" / "images" / "demo.png").stat().st_size < 300_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_valid_and_stripped(path: Path) -> None:
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert all(cell.get("id") for cell in notebook.cells)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
            ast.parse(cell.source)

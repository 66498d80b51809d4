"""What is built and installed: the names, the files, and that they work away from the source tree."""

import importlib
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("samplers", "search", "distill")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Standard output of a command; its output is the message if it fails."""
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def source_files(package: str) -> set[str]:
    """Paths of a package's own files, relative to the source tree."""
    files = (path for path in (ROOT / package).rglob("*") if path.is_file())
    return {path.relative_to(ROOT).as_posix() for path in files if not {"__pycache__"} & set(path.parts)}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source tree."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    [path] = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    """Every file in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_and_are_typed(package: str) -> None:
    module = importlib.import_module(package)
    assert isinstance(module.__all__, list)
    assert (ROOT / package / "py.typed").is_file()


@pytest.mark.slow
def test_wheel_installs_only_our_names(names: set[str]) -> None:
    top = {name.split("/")[0] for name in names}
    [info] = [name for name in top if name.endswith(".dist-info")]
    assert top == {*PACKAGES, "fewstep.py", info}


@pytest.mark.slow
@pytest.mark.parametrize("package", PACKAGES)
def test_wheel_ships_whole_packages(names: set[str], package: str) -> None:
    assert f"{package}/py.typed" in names
    shipped = {name for name in names if name.startswith(f"{package}/")}
    assert {name for name in shipped if not name.startswith("samplers/configs/")} == source_files(package)
    assert not {"tests", "benchmarks", "notebooks", "docs"} & {part for name in shipped for part in name.split("/")}


@pytest.mark.slow
def test_wheel_ships_configs(names: set[str]) -> None:
    root = ROOT / "configs"
    found = {f"samplers/configs/{path.relative_to(root).as_posix()}" for path in root.rglob("*.json")}
    assert "samplers/configs/demo.json" in found
    assert {name for name in names if name.startswith("samplers/configs/")} == found


@pytest.mark.slow
def test_installed_wheel_works_elsewhere(wheel: Path, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", target, wheel, cwd=elsewhere)
    code = f"import {', '.join((*PACKAGES, 'fewstep'))}; print(samplers.__file__); print(*samplers.shipped_schedules())"
    file, *schedules = run(sys.executable, "-c", code, cwd=elsewhere, PYTHONPATH=str(target)).splitlines()
    assert Path(file) == target / "samplers" / "__init__.py"
    assert set(" ".join(schedules).split()) == {path.stem for path in (ROOT / "configs" / "schedules").glob("*.json")}


@pytest.mark.slow
def test_source_distribution_leaves_out_benchmark_models(tmp_path: Path) -> None:
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path, ROOT, cwd=tmp_path)
    [path] = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        inside = {name.split("/", 1)[1] for name in archive.getnames()}
    assert not [name for name in inside if name.startswith("benchmarks/models/") and name.count("/") > 2]
    for package in PACKAGES:
        assert source_files(package) <= inside
    assert {"fewstep.py", "pyproject.toml", "README.md", "LICENSE", "tests/conftest.py"} <= inside

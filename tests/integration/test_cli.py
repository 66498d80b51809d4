"""The command line as people run it: a subprocess, its streams, its files, its exit codes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

import fewstep
from samplers import NoiseSchedule, recipe

COMMAND = [sys.executable, "-m", "fewstep"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


def run(*args: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*COMMAND, *map(str, args)], capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def test_sample_writes_images_a_grid_and_a_record(tmp_path: Path) -> None:
    out = tmp_path / "images"
    done = run("sample", "--sampler", "unipc:order=3", "--nfe", 5, "--num", 12, "--batch-size", 5, "--out", out, "--json")
    record = json.loads(done.stdout)
    assert record["complete"]
    assert record["counted_nfe"] == 5
    assert record["schedule"]["nfe"] == 5
    assert sorted(p.name for p in out.glob("0*.png")) == [f"{i:05d}.png" for i in range(12)]
    assert size(out / "00000.png") == (8, 8)
    assert size(out / "grid.png")[0] > 100


@pytest.mark.slow
def test_images_depend_on_their_seed_and_not_on_the_batch(tmp_path: Path) -> None:
    common = ("sample", "--sampler", "ddim", "--nfe", 3, "--num", 6, "--class-labels", "4,7")
    run(*common, "--batch-size", 6, "--out", tmp_path / "a")
    run(*common, "--batch-size", 2, "--out", tmp_path / "b")
    for i in range(6):
        a, b = (pixels(tmp_path / folder / f"{i:05d}.png") for folder in "ab")
        assert max(abs(p - q) for p, q in zip(a, b, strict=True)) <= 1


@pytest.mark.slow
def test_a_killed_run_is_completed_and_another_run_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "images"
    args = [*COMMAND, *map(str, ("sample", "--sampler", "ddim", "--nfe", 20, "--num", 60, "--batch-size", 2, "--out", out))]
    process = subprocess.Popen(args, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 90
    while not (out / "00003.png").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("0*.png")}
    assert 4 <= len(before) < 60
    done = subprocess.run(args, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list(out.glob("0*.png"))) == 60
    assert all((out / name).stat().st_mtime_ns == written for name, written in before.items())
    refused = run("sample", "--sampler", "ddim", "--nfe", 21, "--num", 60, "--out", out, code=2)
    assert "holds another run (nfe differ)" in refused.stderr.replace("\n", " ")


def test_interrupt_is_exit_code_4(tmp_path: Path) -> None:
    # A shell's background jobs ignore interrupts, and programs that they start inherit that: this one must not.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        _interrupt(tmp_path / "images")
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupt(out: Path) -> None:
    args = [*COMMAND, *map(str, ("sample", "--sampler", "ddim", "--nfe", 50, "--num", 400, "--batch-size", 4, "--out", out))]
    process = subprocess.Popen(args, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 90
    while not (out / "00000.png").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 4, errors
    assert "continues where it stopped" in errors


def call(monkeypatch: pytest.MonkeyPatch, *args: str | Path) -> int:
    """The same entry point inside this process: exit code; output is left to capsys."""
    monkeypatch.setattr(sys, "argv", ["fewstep", *map(str, args)])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        fewstep.main()
    return int(stop.value.code or 0)


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("--sampler", "unipcc", "--nfe", "5"), 2, "unknown schedule 'unipcc'"),
        (("--sampler", "unipc:order=9", "--nfe", "5"), 2, "order must be 1..4, got 9"),
        (("--sampler", "unipc:oder=3", "--nfe", "5"), 2, "no option 'oder'; known: order"),
        (("--sampler", "ddim", "--nfe", "0"), 2, "--nfe"),
        (("--sampler", "ddim", "--nfe", "5", "--model", "./nowhere"), 3, "no model folder './nowhere'"),
        (("--sampler", "ddim", "--nfe", "5", "--prompt", "a cat"), 2, "--prompt does not apply"),
        (("--sampler", "ddim", "--nfe", "5", "--class-labels", "3,x"), 2, "comma-separated whole numbers"),
        (("--sampler", "ddim", "--nfe", "5", "--class-labels", "12"), 2, "[12] are outside 0..10 of this model"),
        (("--sampler", "ddim", "--nfe", "5", "--dtype", "int8"), 2, "unknown dtype 'int8'; known: float32"),
    ],
)
def test_bad_input_is_one_clear_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    assert call(monkeypatch, "sample", *args, "--out", tmp_path / "images") == code
    printed = capsys.readouterr()
    assert message in " ".join(printed.err.split())
    assert printed.out == ""
    assert not (tmp_path / "images").exists()


def test_schedule_show_validate_list_and_doctor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def output(*args: str | Path) -> str:
        assert call(monkeypatch, *args) == 0
        return capsys.readouterr().out

    path, plot = tmp_path / "mine.json", tmp_path / "mine.png"
    recipe("deis:order=3,grid=lambda", NoiseSchedule.vp_linear(), 6).save(path)
    assert "x6 =" in output("schedule", "show", path, "--noise", "vp_linear", "--plot", plot)
    assert size(plot)[0] > 500
    assert json.loads(output("schedule", "show", "ddim", "--nfe", "4", "--json"))["nfe"] == 4
    assert "valid, 6 steps, 6 network evaluations" in output("schedule", "validate", path, "--noise", "vp_linear")
    listed = json.loads(output("schedule", "list", "--json"))
    assert {"ddim", "dpmpp", "unipc", "deis", "ipndm", "euler"} <= set(listed["recipes"])
    report = json.loads(output("doctor", "--json"))
    assert report["reference_pipelines"] == ["digits", "digits-conditional"]
    assert report["packages"]["torch"]


def test_schedule_errors_name_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def complaint(*args: str | Path) -> str:
        assert call(monkeypatch, "schedule", *args) == 2
        return " ".join(capsys.readouterr().err.split())

    path = tmp_path / "mine.json"
    path.write_text("{ not json")
    assert "not JSON" in complaint("validate", path)
    good = recipe("dpmpp", NoiseSchedule.edm(), 4)
    path.write_text(json.dumps({**good.to_dict(), "nfe": 7}))
    assert "says nfe 7, its steps make 4" in complaint("validate", path, "--noise", "edm")
    good.save(path)
    assert "belong to 'edm'" in complaint("validate", path, "--noise", "flow")
    assert "--nfe asks for 5" in complaint("show", path, "--nfe", "5", "--noise", "edm")
    assert "unknown noise schedule 'vpp'" in complaint("show", path, "--noise", "vpp")


@pytest.mark.slow
def test_demo_draws_its_picture_and_beats_the_schedulers_it_shows(tmp_path: Path) -> None:
    done = run("demo", "--images", 20, "--out", tmp_path, "--json")
    record = json.loads(done.stdout)
    assert size(tmp_path / "demo.png")[0] > 1000
    assert "| sampler |" in (tmp_path / "demo.md").read_text()
    for nfe in {row["nfe"] for row in record["results"]}:
        rows = [row for row in record["results"] if row["nfe"] == nfe]
        ours = min(row["rmse"] for row in rows if not row["sampler"].startswith("diffusers"))
        theirs = min(row["rmse"] for row in rows if row["sampler"].startswith("diffusers"))
        assert ours < theirs

"""Saving and loading schedules: whole files or none, and errors that name the file and the reason."""

from pathlib import Path

import pytest

from samplers import NoiseSchedule, SolverSchedule, StepStrategy, recipe, shipped_schedules


def test_save_replaces_the_file_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "schedule.json"
    first = recipe("ddim", NoiseSchedule.vp_linear(), 4)
    first.save(path)
    broken = SolverSchedule(times=(1.0, 0.5), steps=(StepStrategy(),), provenance={"not": object()})
    with pytest.raises(TypeError):
        broken.save(path)
    assert SolverSchedule.load(path) == first

    def fail(self: Path, target: Path) -> None:
        raise OSError("disk")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk"):
        recipe("ddim", NoiseSchedule.vp_linear(), 5).save(path)
    assert SolverSchedule.load(path) == first


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "schedule.json: not JSON"),
        (b"\xff\xfe", "schedule.json: not JSON"),
        (b"[1, 2]", "schedule.json: a solver schedule is a JSON object, got list"),
        (b"{}", "schedule.json: not a solver schedule"),
        (b'{"format": "solver-schedule/1", "times": [1, 0], "steps": [{"order": 2}]}', r"schedule.json: .*steps\[0\]"),
    ],
)
def test_load_names_the_file_and_the_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "schedule.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        SolverSchedule.load(path)


def test_load_of_what_does_not_exist_lists_what_ships(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing.json: no such file, nor a schedule that ships \(those are: "):
        SolverSchedule.load(tmp_path / "nothing.json")
    with pytest.raises(FileNotFoundError, match="unipc:order=3: no such file"):
        SolverSchedule.load("unipc:order=3")
    with pytest.raises(FileNotFoundError, match="no such file"):
        SolverSchedule.load(tmp_path)


def test_load_takes_a_dict_too() -> None:
    mapping = recipe("unipc:order=3", NoiseSchedule.flow(), 5).to_dict()
    assert SolverSchedule.load(mapping) == SolverSchedule.from_dict(mapping)


def test_load_by_name_finds_what_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = recipe("ddim", NoiseSchedule.edm(), 3)
    schedule.save(tmp_path / "found-a.json")
    monkeypatch.setattr("samplers.strategy.shipped_schedules", lambda: {"found-a": tmp_path / "found-a.json"})
    assert SolverSchedule.load("found-a") == schedule
    with pytest.raises(FileNotFoundError, match=r"found-b: .*those are: found-a\)"):
        SolverSchedule.load("found-b")


def test_everything_that_ships_loads() -> None:
    for name in shipped_schedules():
        assert SolverSchedule.load(name).nfe >= 1

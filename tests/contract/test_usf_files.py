"""Published schedule files: every layout in circulation comes through, code does not."""

import json
import os
import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from samplers import SolverSchedule
from samplers.peers import load_usf

PUBLISHED = json.loads((Path(__file__).parent.parent / "golden" / "usf" / "edm-5step-v3.json").read_text())
for extra in ("nfe", "noise_schedule"):
    del PUBLISHED[extra]
NUMPY = {
    **PUBLISHED,
    "timesteps": [np.float64(t) for t in PUBLISHED["timesteps"]],
    "orders": [np.int64(order) for order in PUBLISHED["orders"]],
}
OLD = {"_use_new_zipfile_serialization": False}


def _pickled(content: Any, protocol: int = 4) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(pickle.dumps(content, protocol))


GOOD: dict[str, tuple[Callable[[Path], Any], float | None]] = {
    "json": (lambda path: path.write_text(json.dumps(PUBLISHED)), None),
    "json with score": (lambda path: path.write_text(json.dumps([PUBLISHED, 6.25])), 6.25),
    "torch": (lambda path: torch.save(PUBLISHED, path), None),
    "torch, numpy scalars, score": (lambda path: torch.save([NUMPY, np.float64(6.25)], path), 6.25),
    "torch before archives": (lambda path: torch.save([NUMPY, 6.25], path, **OLD), 6.25),
    "torch, tensors": (lambda path: torch.save({**PUBLISHED, "timesteps": torch.tensor(PUBLISHED["timesteps"])}, path), None),
    "pickle": (_pickled([NUMPY, 6.25]), 6.25),
    "old pickle": (_pickled((NUMPY, np.float32(6.25)), 2), 6.25),
    "pickle, array": (_pickled(OrderedDict({**PUBLISHED, "timesteps": np.array(PUBLISHED["timesteps"])})), None),
}


@pytest.mark.parametrize("name", GOOD)
def test_every_layout_is_read(name: str, tmp_path: Path) -> None:
    write, score = GOOD[name]
    path = tmp_path / "schedule.pth"
    write(path)
    found, expected = load_usf(path), SolverSchedule.from_usf(PUBLISHED)
    assert found.steps == expected.steps
    assert found.times == pytest.approx(expected.times, rel=1e-6 if "tensors" in name else 0.0)
    assert found.provenance.get("published_score") == score


class Hostile:
    """What runs when a careless program loads it."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, ("owned",)


BAD: dict[str, Callable[[Path], Any]] = {
    "pickle": _pickled(Hostile()),
    "inside a schedule": _pickled([{**PUBLISHED, "afs": Hostile()}, 1.0]),
    "torch": lambda path: torch.save({**PUBLISHED, "afs": Hostile()}, path),
    "torch before archives": lambda path: torch.save({**PUBLISHED, "afs": Hostile()}, path, **OLD),
    "array of objects": _pickled(np.array([Hostile()], dtype=object)),
    "module": lambda path: torch.save(torch.nn.Linear(1, 1), path),
    "eval": lambda path: path.write_bytes(b"cbuiltins\neval\n(S'1+1'\ntR."),
    "codec": lambda path: path.write_bytes(b"c_codecs\nencode\n(S'x'\nS'zip'\ntR."),
}


@pytest.mark.parametrize("name", BAD)
def test_code_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "schedule.pth"
    BAD[name](path)
    with pytest.raises(ValueError, match=r"refused: it asks for .*, which is code"):
        load_usf(path)
    assert [p.name for p in tmp_path.iterdir()] == ["schedule.pth"]


@pytest.mark.parametrize("name", ["pickle", "torch", "torch before archives"])
def test_the_hostile_files_are_hostile(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded without care they run, so that the test above can fail."""
    monkeypatch.chdir(tmp_path)
    BAD[name](tmp_path / "schedule.pth")
    if name == "pickle":
        pickle.loads((tmp_path / "schedule.pth").read_bytes())
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.load(tmp_path / "schedule.pth", weights_only=False)
    assert (tmp_path / "owned").is_dir()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a published schedule: Ran out of input"),
        (b"hello", "not a published schedule"),
        (b"{", "not a published schedule: .*property name"),
        (b"[1, 2, 3]", r"a published schedule is a dict or \[dict, score\], not list"),
        (pickle.dumps({1, 2}), "a schedule holds numbers, text and lists, not set"),
        (json.dumps({"timesteps": [1.0]}).encode(), "missing orders"),
        (json.dumps({**PUBLISHED, "orders": [1, 2, 3, 3]}).encode(), "orders has 4 entries for 5 steps"),
        (json.dumps({**PUBLISHED, "corrector_types": [{}] * 5}).encode(), "not a published schedule: 'type'"),
    ],
)
def test_what_is_no_schedule_is_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "schedule.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        load_usf(path)


def test_files_that_are_missing_huge_or_other_archives(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_usf(tmp_path / "none.pth")
    with (tmp_path / "large.pth").open("wb") as file:
        file.truncate(2**24 + 1)
    with pytest.raises(ValueError, match="16777217 bytes are too many for a schedule"):
        load_usf(tmp_path / "large.pth")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("a.txt", "text")
    with pytest.raises(ValueError, match="not a published schedule"):
        load_usf(tmp_path / "other.zip")


def test_skip_factors_come_along_as_facts() -> None:
    schedule = SolverSchedule.from_usf({**PUBLISHED, "skip_coefficients": [np.float32(0.5)] * 15})
    assert schedule.provenance["skip_coefficients"] == [0.5] * 15
    assert schedule.digest == SolverSchedule.from_usf(PUBLISHED).digest

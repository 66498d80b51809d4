"""Other people's files: tensors and plain data come through, code is never run."""

from __future__ import annotations

import json
import os
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from samplers import NoiseSchedule
from samplers.peers import from_dyweight, from_epd, read_table

WEIGHTS = torch.tensor([[1.0, 0.0, 0.0], [-0.5, 1.5, 0.0], [0.2, -0.7, 1.5]])
EDM = NoiseSchedule.edm()


class Bomb:
    """Runs a command when it is unpickled in the ordinary way."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def write(path: Path, table: dict[str, Any]) -> None:
    if path.suffix == ".json":
        path.write_text(json.dumps({key: value.tolist() if torch.is_tensor(value) else value for key, value in table.items()}))
    elif path.suffix == ".npz":
        np.savez(path, **{key: np.asarray(value) for key, value in table.items()})
    elif path.suffix == ".safetensors":
        save_file({key: torch.as_tensor(value) for key, value in table.items()}, path)
    else:
        torch.save(table, path)


@pytest.mark.parametrize("suffix", [".json", ".npz", ".safetensors", ".pt", ".pth", ".ckpt"])
def test_every_kind_of_file_gives_the_same_schedule(suffix: str, tmp_path: Path) -> None:
    table = {"hybrid_weights": WEIGHTS, "afs": True}
    write(tmp_path / f"table{suffix}", table)
    assert from_dyweight(tmp_path / f"table{suffix}", EDM).digest == from_dyweight(table, EDM).digest


@pytest.fixture
def foreign_modules(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Stand-ins for the modules that published snapshots name, present only while a snapshot is written."""
    persistence, dnnlib = types.ModuleType("torch_utils.persistence"), types.ModuleType("dnnlib.util")

    def _reconstruct_persistent_obj(meta: dict[str, Any]) -> object:
        raise AssertionError("the snapshot's own code must not run")

    class EasyDict(dict):
        pass

    _reconstruct_persistent_obj.__module__, EasyDict.__module__ = "torch_utils.persistence", "dnnlib.util"
    _reconstruct_persistent_obj.__qualname__, EasyDict.__qualname__ = "_reconstruct_persistent_obj", "EasyDict"
    persistence._reconstruct_persistent_obj, dnnlib.EasyDict = _reconstruct_persistent_obj, EasyDict
    for name, module in (("torch_utils", types.ModuleType("torch_utils")), ("dnnlib", types.ModuleType("dnnlib"))):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", persistence)
    monkeypatch.setitem(sys.modules, "dnnlib.util", dnnlib)
    return persistence


class Snapshot:
    """Pickles as modules that carry their source do: a function, and a dict with the source and the state."""

    def __init__(self, persistence: types.ModuleType, easy: type, module: torch.nn.Module) -> None:
        self.call, self.easy, self.module = persistence._reconstruct_persistent_obj, easy, module

    def __reduce__(self) -> tuple[Any, ...]:
        state = dict(self.module.__dict__)
        meta = self.easy(type="class", version=6, module_src="raise SystemExit", class_name="X", state=state)
        return self.call, (meta,)


def test_module_snapshots_give_their_parameters(tmp_path: Path, foreign_modules: types.ModuleType) -> None:
    module = torch.nn.Module()
    g = torch.Generator().manual_seed(0)
    table = {name: torch.randn(3, 2, generator=g) for name in ("r_params", "weight_s", "scale_dir_params", "scale_time_params")}
    for name, value in table.items():
        module.register_parameter(name, torch.nn.Parameter(value))
    module.register_buffer("mask", torch.ones(2))
    module.afs, module.scale_dir, module.scale_time, module.fcn, module.num_steps = True, 0.05, 0.2, True, 4
    path = tmp_path / "network-snapshot-000010.pkl"
    path.write_bytes(pickle.dumps({"model": Snapshot(foreign_modules, sys.modules["dnnlib.util"].EasyDict, module)}))
    wanted = from_epd({**table, "afs": True, "scale_dir": 0.05, "scale_time": 0.2, "fcn": True}, EDM)
    assert from_epd(path, EDM).digest == wanted.digest
    assert read_table(path)["num_steps"] == 4


@pytest.mark.parametrize("suffix", [".pkl", ".pt", ".npz"])
def test_hostile_files_are_refused(suffix: str, tmp_path: Path) -> None:
    trace, path = tmp_path / "trace", tmp_path / f"table{suffix}"
    table = {"hybrid_weights": WEIGHTS, "extra": Bomb(trace)}
    if suffix == ".pkl":
        path.write_bytes(pickle.dumps(table))
    elif suffix == ".pt":
        torch.save(table, path)
    else:
        np.savez(path, extra=np.array([Bomb(trace)], dtype=object))
    with pytest.raises(ValueError, match=str(path)):
        read_table(path)
    assert not trace.exists()


def test_a_bomb_inside_a_tensor_is_refused(tmp_path: Path) -> None:
    """Tensor storages in a pickle are files of their own, which are read as weights only too."""
    trace, path = tmp_path / "trace", tmp_path / "inner.pt"
    torch.save({"x": Bomb(trace)}, path)
    inner = path.read_bytes()

    class Storage:
        def __reduce__(self) -> tuple[Any, tuple[bytes]]:
            return torch.storage._load_from_bytes, (inner,)

    outer = tmp_path / "outer.pkl"
    outer.write_bytes(pickle.dumps({"x": Storage()}))
    with pytest.raises(ValueError, match=r"outer\.pkl"):
        read_table(outer)
    assert not trace.exists()


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file"):
        read_table(tmp_path / "nothing.pt")
    (tmp_path / "table.csv").write_text("1,2")
    with pytest.raises(ValueError, match="unknown kind of file"):
        read_table(tmp_path / "table.csv")
    with pytest.raises(ValueError, match="no 'hybrid_weights'; it has: weights"):
        from_dyweight({"weights": WEIGHTS}, EDM)
    with pytest.raises(ValueError, match=r"should be square, got \(3, 2\)"):
        from_dyweight({"hybrid_weights": WEIGHTS[:, :2]}, EDM)
    with pytest.raises(ValueError, match="finite numbers"):
        from_dyweight({"hybrid_weights": WEIGHTS * float("nan")}, EDM)
    with pytest.raises(ValueError, match="finite sigma / alpha"):
        from_dyweight({"hybrid_weights": WEIGHTS}, NoiseSchedule.flow())

"""Reading tables that others published: tensors and plain data come through, code does not."""

from __future__ import annotations

import io
import json
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

Source = str | Path | Mapping[str, Any]


def _storage(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=True)


def _object(meta: Mapping[str, Any]) -> Mapping[str, Any]:
    """Stands in for objects that carry their own source code: their state is kept, the code is not run."""
    return dict(meta.get("state") or {})


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _object,
    ("dnnlib.util", "EasyDict"): dict,
    ("dnnlib", "EasyDict"): dict,
    ("builtins", "set"): set,
}


class _Unpickler(pickle.Unpickler):
    """Knows tensors and containers; any other name in the file is refused before it is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise ValueError(f"the file asks for {module}.{name}, which is not data; it was not loaded") from None


def _arrays(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def _snapshot(path: Path) -> Any:
    with path.open("rb") as file:
        return _Unpickler(file).load()


def _weights(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


_READERS: dict[str, Callable[[Path], Any]] = {
    ".json": lambda path: json.loads(path.read_text()),
    ".safetensors": safetensors.torch.load_file,
    ".npz": _arrays,
    ".pkl": _snapshot,
    ".pt": _weights,
    ".pth": _weights,
    ".ckpt": _weights,
}


def read_table(source: Source) -> dict[str, Any]:
    """A published table as a dict of names.

    Args:
        source: a mapping, or a file: .json, .safetensors, .npz, .pt / .pth / .ckpt (weights only) or .pkl (a snapshot of a
            module with its parameters; its code is not run).

    Returns:
        Names to tensors, numbers, strings or containers; of a module, its attributes and parameters.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown kind of file, or one that holds more than data.
    """
    if isinstance(source, Mapping):
        return dict(source)
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    kind = path.suffix.lower()
    if kind not in _READERS:
        raise ValueError(f"{path}: unknown kind of file; known: {', '.join(_READERS)}")
    try:
        data = _READERS[kind](path)
    except (pickle.UnpicklingError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: {str(error).splitlines()[0]}") from None
    module = _module_state(data)
    if module is not None:
        return module
    if not isinstance(data, Mapping):
        raise ValueError(f"{path} holds {type(data).__name__}, not named values")
    return dict(data)


def _module_state(data: Any) -> dict[str, Any] | None:
    """The attributes, parameters and buffers of the first module found, by name."""
    if not isinstance(data, Mapping):
        return None
    if isinstance(data.get("_parameters"), Mapping):
        own = {name: value for name, value in data.items() if not name.startswith("_")}
        return {**own, **data["_parameters"], **data.get("_buffers", {})}
    for value in data.values():
        if (found := _module_state(value)) is not None:
            return found
    return None


def number_array(table: Mapping[str, Any], name: str, dimensions: int) -> Tensor:
    """A table's entry as a float64 tensor.

    Raises:
        ValueError: missing, not numeric, not finite, or with other than ``dimensions`` axes.
    """
    if name not in table or table[name] is None:
        raise ValueError(f"the table has no {name!r}; it has: {', '.join(sorted(map(str, table))) or 'nothing'}")
    try:
        array = torch.as_tensor(table[name]).detach().to(torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name!r} is not an array of numbers") from None
    if array.ndim != dimensions or not bool(array.isfinite().all()):
        raise ValueError(f"{name!r} should be {dimensions} axes of finite numbers, got shape {tuple(array.shape)}")
    return array

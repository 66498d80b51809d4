"""Files of published USF schedules (arXiv:2312.07243): JSON, torch files and plain pickles, read as data alone."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..strategy import SolverSchedule

LARGEST = 2**24  # bytes; a schedule has a few thousand
TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # the first object of torch's files from before it used archives


class _CodeError(pickle.UnpicklingError):
    """The file asks for more than data."""


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise _CodeError(f"it asks for codec {encoding!r}, which is code")
    return text.encode("latin1")


# Numpy moved its module between the versions that wrote such files.
_NUMPY: dict[tuple[str, str], Any] = {
    (f"numpy.{core}.multiarray", name): value.__reduce__()[0]
    for core in ("core", "_core")
    for name, value in (("scalar", np.float64(0.0)), ("_reconstruct", np.zeros(0)))
}
_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    **_NUMPY,
    ("numpy", "dtype"): np.dtype,
    ("numpy", "ndarray"): np.ndarray,
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _latin1,  # how old protocols write bytes
}


class _Unpickler(pickle.Unpickler):
    """Knows numbers and containers; any other name in the file is refused before it is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise _CodeError(f"it asks for {module}.{name}, which is code") from None

    def persistent_load(self, pid: Any) -> Any:
        raise _CodeError("it points at data outside itself")


def load_usf(path: str | Path) -> SolverSchedule:
    """The schedule in a published file: a dict as `SolverSchedule.from_usf` takes it, alone or as ``[dict, score]``.

    Args:
        path: JSON, what ``torch.save`` writes, or a plain pickle; numbers may be numpy's or torch's. Files are told apart by
            their content. No code in them is run.

    Returns:
        The schedule, with the score in ``provenance["published_score"]`` where there is one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: code in the file, or anything that is not a schedule; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path}: {path.stat().st_size} bytes are too many for a schedule")
    try:
        content = _plain(_read(path))
        score = None
        if isinstance(content, list) and len(content) == 2 and isinstance(content[0], dict):
            content, score = content
        if not isinstance(content, dict):
            raise ValueError(f"a published schedule is a dict or [dict, score], not {type(content).__name__}")
        schedule = SolverSchedule.from_usf(content)
    except _CodeError as error:
        raise ValueError(f"{path}: refused: {error}") from None
    except (pickle.UnpicklingError, ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError) as error:
        raise ValueError(f"{path}: not a published schedule: {str(error) or type(error).__name__}") from None
    if score is not None:
        schedule.provenance["published_score"] = score
    return schedule


def _read(path: Path) -> Any:
    if zipfile.is_zipfile(path):
        return _torch(path)
    if path.read_bytes()[:1].lstrip() in (b"{", b"[") or path.suffix.lower() == ".json":
        return json.loads(path.read_text())
    with path.open("rb") as file:
        first = _Unpickler(file).load()
    return _torch(path) if first == TORCH_MAGIC else first


def _torch(path: Path) -> Any:
    kinds = {type(np.dtype(code)) for code in "?" + np.typecodes["AllInteger"] + np.typecodes["AllFloat"] if code not in "FDG"}
    named = [(value, f"{module}.{name}") for (module, name), value in _NUMPY.items()]
    with torch.serialization.safe_globals([*named, np.dtype, np.ndarray, *kinds]):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except RuntimeError as error:
            raise ValueError(str(error).splitlines()[0]) from None
        except pickle.UnpicklingError as error:
            # torch's own message goes on to suggest loading the file unsafely
            raise _CodeError(_named_by(str(error))) from None


def _named_by(message: str) -> str:
    found = re.search(r"GLOBAL ([\w.]+)|got <class '([\w.]+)'>", message)
    return f"it asks for {found[1] or found[2]}, which is code" if found else "it holds more than numbers and containers"


def _plain(value: Any) -> Any:
    """Tensors and numpy's numbers as Python's; containers all the way down."""
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, torch.Tensor | np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        return _plain(value.item())
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"a schedule holds numbers, text and lists, not {type(value).__name__}")

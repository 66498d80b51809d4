"""Where weights are looked for, and how they are checked."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..models import MissingModelError


@dataclass(frozen=True)
class WeightsFile:
    """A published file of weights.

    Attributes:
        names: under which tools keep it; the first one is used for downloads.
        url: where it comes from.
        sha256: of its content.
        size: bytes.
        variable: environment variable that may name its path.
    """

    names: tuple[str, ...]
    url: str
    sha256: str
    size: int
    variable: str


INCEPTION = WeightsFile(
    names=("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth"),
    url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    size=95_628_359,
    variable="FEWSTEP_INCEPTION_WEIGHTS",
)


def find_weights(file: WeightsFile, path: str | Path | None = None, *, offline: bool = False) -> Path:
    """The path of a weights file.

    Looked for in this order: ``path``, the environment variable, torch's checkpoint folder. What is missing is downloaded
    into that folder only if TORCH_HOME names it and ``offline`` is not set; nothing else is ever written.

    Args:
        file: which.
        path: a file, or a folder that holds it.
        offline: never download.

    Raises:
        MissingModelError: it is nowhere; the message says file, size, source and where to put it.
    """
    given = path or os.environ.get(file.variable)
    home = os.environ.get("TORCH_HOME")
    folder = Path(home or Path.home() / ".cache/torch") / "hub" / "checkpoints"
    if given:
        place = Path(given)
        for candidate in (place, *(place / name for name in file.names)):
            if candidate.is_file():
                return candidate
        raise MissingModelError(f"no weights at {place}; {_advice(file, folder)}")
    for name in file.names:
        if (folder / name).is_file():
            return folder / name
    if offline or not home:
        raise MissingModelError(f"the Inception weights are missing; {_advice(file, folder)}")
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / file.names[0]
    torch.hub.download_url_to_file(file.url, str(target), hash_prefix=file.sha256)
    return target


def _advice(file: WeightsFile, folder: Path) -> str:
    return (
        f"{file.names[0]} ({file.size / 1e6:.1f} MB, SHA-256 {file.sha256[:16]}...) comes from {file.url}; "
        f"put it into {folder}, or name its path with --weights or {file.variable}, "
        f"or set TORCH_HOME and leave out --offline to download it"
    )


def sha256(*paths: Path) -> str:
    """SHA-256 of the contents of files, one after another."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file or of a ``torch.save`` file that holds nothing but tensors.

    Raises:
        ValueError: neither.
    """
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is no file of weights: {str(error).splitlines()[0]}") from error
    if not isinstance(state, dict) or not all(torch.is_tensor(value) for value in state.values()):
        raise ValueError(f"{path} holds something else than named tensors")
    return state

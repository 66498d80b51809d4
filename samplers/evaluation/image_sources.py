"""Real images and their classes by name: a folder, a zip, an npz, the shipped digits, torchvision or Hugging Face data."""

from __future__ import annotations

import hashlib
import inspect
import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from ..reference import digit_images
from .features import quantise

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}
HELP = (
    "a folder or zip of images, an npz with arr_0, digits[:train|test|all], torchvision:CLASS:train|test[:ROOT], "
    "datasets:NAME_OR_FOLDER:SPLIT[:COLUMN]"
)


@dataclass(frozen=True)
class ImageSource:
    """A set of real images.

    Attributes:
        name: as the user gave it.
        id: hash of what decides the content.
        length: images.
        image: image number to (C, H, W) uint8.
        read_classes: where the source knows a class of every image, a function that gives them (N,) int64.
    """

    name: str
    id: str
    length: int
    image: Callable[[int], Tensor]
    read_classes: Callable[[], Tensor] | None = None

    def classes(self) -> Tensor:
        """The class of every image, (N,) int64.

        Raises:
            ValueError: the source knows none.
        """
        if self.read_classes is None:
            raise ValueError(
                f"{self.name} knows no classes of its images: use a folder with one sub-folder per class, an npz with arr_1, "
                "digits, torchvision:... or a datasets data set with one column of class labels"
            )
        labels = self.read_classes()
        if labels.shape != (self.length,) or int(labels.min()) < 0:
            raise ValueError(f"{self.name} has {self.length} images and {len(labels)} class labels; none may be negative")
        return labels

    def batches(self, size: int) -> Iterator[Tensor]:
        """All images in order, (B, C, H, W) uint8 with B up to ``size``; a batch ends where the shape changes."""
        pending: list[Tensor] = []
        for i in range(self.length):
            image = self.image(i)
            if pending and (len(pending) == size or image.shape != pending[0].shape):
                yield torch.stack(pending)
                pending = []
            pending.append(image)
        if pending:
            yield torch.stack(pending)


def open_images(source: str) -> ImageSource:
    """Open a set of real images; nothing is read but names and sizes.

    Args:
        source: see `HELP`.

    Raises:
        FileNotFoundError: no such path.
        ValueError: not a set of images, an empty one, or an unknown split.
    """
    kind, _, rest = source.partition(":")
    if kind == "digits" and not Path(source).exists():
        return _digits(source, rest or "train")
    if kind in ("torchvision", "datasets") and rest:
        opened = _torchvision(source, rest) if kind == "torchvision" else _datasets(source, rest)
    else:
        path = Path(source)
        if path.is_dir():
            opened = _folder(source, path)
        elif not path.is_file():
            raise FileNotFoundError(f"no images at {source!r}; known: {HELP}")
        elif path.suffix == ".zip":
            opened = _zip(source, path)
        elif path.suffix == ".npz":
            opened = _npz(source, path)
        else:
            raise ValueError(f"{source!r} is no set of images; known: {HELP}")
    if not opened.length:
        raise ValueError(f"{source} holds no images")
    return opened


def _tensor(image: Image.Image) -> Tensor:
    return pil_to_tensor(image if image.mode in ("L", "RGB") else image.convert("RGB"))


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _digits(source: str, split: str) -> ImageSource:
    pixels, labels = digit_images(split)
    images = quantise((pixels + 1) / 2)
    identity = hashlib.sha256(images.numpy().tobytes()).hexdigest()
    return ImageSource(source, identity, len(images), lambda i: images[i], lambda: labels.long())


def _folder(source: str, path: Path) -> ImageSource:
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
    sizes = [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]

    def read(i: int) -> Tensor:
        with Image.open(files[i]) as image:
            return _tensor(image)

    groups = [file.relative_to(path).parts[0] for file in files if file.parent != path]
    names = sorted(set(groups))
    known = (lambda: torch.tensor([names.index(group) for group in groups])) if len(groups) == len(files) else None
    return ImageSource(source, _hash("folder", sizes), len(files), read, known)


def _zip(source: str, path: Path) -> ImageSource:
    archive = zipfile.ZipFile(path)
    entries = sorted(
        (entry for entry in archive.infolist() if Path(entry.filename).suffix.lower() in SUFFIXES), key=lambda e: e.filename
    )

    def read(i: int) -> Tensor:
        file: BinaryIO
        with archive.open(entries[i]) as file, Image.open(file) as image:
            return _tensor(image)

    return ImageSource(source, _hash("zip", [(e.filename, e.file_size, e.CRC) for e in entries]), len(entries), read)


def _npz(source: str, path: Path) -> ImageSource:
    with np.load(path, allow_pickle=False) as file:
        if "arr_0" not in file.files:
            raise ValueError(f"{path} has no arr_0 with images; it has {', '.join(file.files)}")
        array = file["arr_0"]
        labels = torch.from_numpy(file["arr_1"]).long() if "arr_1" in file.files else None
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] not in (1, 3):
        raise ValueError(f"arr_0 of {path} must be (N, H, W, 1 or 3) uint8, not {array.shape} {array.dtype}")
    images = torch.from_numpy(array).permute(0, 3, 1, 2)
    known = None if labels is None else lambda: labels
    return ImageSource(source, hashlib.sha256(array.tobytes()).hexdigest(), len(images), lambda i: images[i], known)


def _torchvision(source: str, rest: str) -> ImageSource:
    from torchvision import datasets

    name, split, root = (*rest.split(":", 2), "", "")[:3]
    kind = getattr(datasets, name, None)
    accepted = inspect.signature(kind).parameters if kind else {}
    chosen = {"train": split == "train"} if "train" in accepted else {"split": split} if "split" in accepted else None
    if chosen is None or split not in ("train", "test"):
        raise ValueError(f"{source!r}: expected torchvision:CLASS:train|test[:ROOT] with a class of torchvision.datasets")
    try:
        data = kind(root or "data", download=False, **chosen)
    except RuntimeError as error:
        raise FileNotFoundError(f"{source}: {error}; nothing is downloaded here, put the data into {root or 'data'}") from error
    found = next((labels for key in ("targets", "labels", "_labels") if (labels := getattr(data, key, None)) is not None), None)
    known = None if found is None else lambda: torch.as_tensor(np.asarray(found)).long()
    identity = _hash("torchvision", name, split, len(data))
    return ImageSource(source, identity, len(data), lambda i: _tensor(data[i][0]), known)


def _datasets(source: str, rest: str) -> ImageSource:
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{source!r} needs the package datasets: pip install datasets") from None
    name, split, column = (*rest.split(":", 2), "", "")[:3]
    if not split:
        raise ValueError(f"{source!r}: expected datasets:NAME_OR_FOLDER:SPLIT[:COLUMN]")
    if (Path(name) / "dataset_dict.json").is_file():
        data = datasets.load_from_disk(name)[split]
    else:
        data = datasets.load_dataset(name, split=split)
    column = column or next((key for key, kind in data.features.items() if isinstance(kind, datasets.Image)), "")
    if column not in data.features:
        raise ValueError(f"{source}: no image column; it has {', '.join(data.features)}")
    labels = [key for key, kind in data.features.items() if isinstance(kind, datasets.ClassLabel)]
    if not labels and str(getattr(data.features.get("label"), "dtype", "")).startswith(("int", "uint")):
        labels = ["label"]
    known = (lambda: torch.tensor(data[labels[0]])) if len(labels) == 1 else None
    identity = _hash("datasets", data._fingerprint, column)
    return ImageSource(source, identity, len(data), lambda i: _tensor(data[i][column]), known)

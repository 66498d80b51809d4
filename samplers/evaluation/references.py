"""The real side of a distance: moments, features, held-out features, and an id; cached in one npz file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .features import FeatureExtractor, FeatureProtocol
from .frechet import FrechetReference
from .image_sources import ImageSource, open_images
from .moments import FeatureMoments

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Reference:
    """Real features.

    Attributes:
        name: of the images or the file.
        id: hash of the images or the moments.
        protocol: id of the protocol that made the features.
        moments: their mean and covariance.
        features: (n, D) float32, or None when a file holds moments alone.
        held_out: (m, D) float32 of real images that are not in the reference, for the floor; or None.
    """

    name: str
    id: str
    protocol: str
    moments: FeatureMoments
    features: Tensor | None = None
    held_out: Tensor | None = None

    def needs_features(self, metric: str) -> Tensor:
        """The features.

        Raises:
            ValueError: there are none.
        """
        if self.features is None:
            raise ValueError(f"{metric} needs the features of real images, and {self.name} holds only mu and sigma")
        return self.features

    def save(self, path: str | Path) -> None:
        """Write an npz file with the field's ``mu`` and ``sigma`` and all the rest; whole or not at all."""
        path = Path(path)
        arrays: dict[str, np.ndarray] = {"mu": self.moments.mean.numpy(), "sigma": self.moments.cov.numpy()}
        arrays |= {key: np.array(getattr(self, key)) for key in ("name", "id", "protocol")}
        if self.moments.n is not None:
            arrays["n"] = np.int64(self.moments.n)
        for key in ("features", "held_out"):
            if getattr(self, key) is not None:
                arrays[key] = getattr(self, key).numpy()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + f".{os.getpid()}.part")
        with partial.open("wb") as file:
            np.savez(file, **arrays)
        partial.replace(path)

    def frechet(self, protocol: FeatureProtocol) -> FrechetReference:
        """Ready for Frechet distances in the protocol's unit."""
        return FrechetReference.from_moments(self.moments, unit_variance=protocol.unit_variance)


def load_reference(path: str | Path, protocol: FeatureProtocol, *, declared: str | None = None) -> Reference:
    """Read an npz with ``mu`` and ``sigma``: our own, or as EDM, ADM, clean-fid and pytorch-fid write them.

    Args:
        path: the file.
        protocol: that the numbers will be made with.
        declared: name of the protocol that made a file which does not say so itself.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another protocol, none declared, other sizes, a pickle.
    """
    path = Path(path)
    moments = FeatureMoments.load(path)
    with np.load(path, allow_pickle=False) as file:
        made = str(file["protocol"]) if "protocol" in file.files else None
        name = str(file["name"]) if "name" in file.files else path.name
        known = str(file["id"]) if "id" in file.files else None
        features, held_out = (torch.from_numpy(file[k]) if k in file.files else None for k in ("features", "held_out"))
    if made is None and declared is None:
        raise ValueError(
            f"{path} does not say how its features were made; if with {protocol.name}, say --ref-protocol {protocol.name} "
            "(EDM, ADM and torch-fidelity: fid-tf; pytorch-fid: fid-ptfid; clean-fid: fid-clean)"
        )
    if made not in (None, protocol.id) or (made is None and declared != protocol.name):
        raise ValueError(f"{path} was made with {made or declared}, not with {protocol.id}: the two cannot be compared")
    digest = hashlib.sha256(moments.mean.numpy().tobytes() + moments.cov.numpy().tobytes()).hexdigest()
    return Reference(name, known or digest, protocol.id, moments, features, held_out)


def reference_features(
    source: str,
    extractor: FeatureExtractor,
    *,
    held_out: str | None = None,
    cache: Path | None = None,
    batch_size: int = 64,
    declared: str | None = None,
    progress: Progress = lambda done, total: None,
) -> Reference:
    """The reference of an image set (or of a file with moments), from the cache when it is there.

    Args:
        source: images as in `open_images`, or an npz file with ``mu`` and ``sigma``.
        extractor: makes the features.
        held_out: real images that are not in ``source``, for the floor; "digits" and "torchvision:X:train" know theirs.
        cache: folder for the features of image sets; None keeps nothing.
        batch_size: images at a time.
        declared: as in `load_reference`.
        progress: called with images done and their number.

    Raises:
        FileNotFoundError: no such images.
        ValueError: as in `open_images` and `load_reference`.
    """
    path = Path(source)
    if path.suffix in (".pkl", ".pickle"):
        raise ValueError(f"{source} is a pickle, which can run code when it is read; save its mu and sigma with numpy.savez")
    if path.suffix == ".npz" and path.is_file():
        with np.load(path, allow_pickle=False) as file:
            if "mu" in file.files:
                return load_reference(path, extractor.protocol, declared=declared)
    images = open_images(source)
    others = open_images(held_out or _usual_held_out(source)) if held_out or _usual_held_out(source) else None
    key = hashlib.sha256(f"{images.id} {others.id if others else ''} {extractor.protocol.id}".encode()).hexdigest()[:32]
    kept = cache / f"reference-{key}.npz" if cache else None
    if kept and kept.is_file():
        return load_reference(kept, extractor.protocol)
    total = images.length + (others.length if others else 0)
    features = extract(images, extractor, batch_size, lambda done: progress(done, total))
    moments = FeatureMoments(features.shape[1])
    moments.update(features)
    rest = extract(others, extractor, batch_size, lambda done: progress(images.length + done, total)) if others else None
    reference = Reference(source, images.id, extractor.protocol.id, moments, features, rest)
    if kept:
        reference.save(kept)
    return reference


def extract(
    images: ImageSource, extractor: FeatureExtractor, batch_size: int, progress: Callable[[int], None] = lambda done: None
) -> Tensor:
    """Features (n, D) float32 on the CPU of all images of a set.

    Raises:
        ValueError: images whose features differ in length, as pixels of several sizes do.
    """
    parts: list[Tensor] = []
    done = 0
    for batch in images.batches(batch_size):
        features = extractor(batch).float().cpu()
        if parts and features.shape[1] != parts[0].shape[1]:
            raise ValueError(f"{images.name}: {extractor.protocol.name} needs images of one size")
        parts.append(features)
        done += len(batch)
        progress(done)
    return torch.cat(parts)


def _usual_held_out(source: str) -> str | None:
    if source in ("digits", "digits:train"):
        return "digits:test"
    if source.startswith("torchvision:") and ":train" in source:
        return source.replace(":train", ":test", 1)
    return None

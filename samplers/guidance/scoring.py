"""Scoring a whole data set: in batches, with progress, resumable, the same numbers however often it was interrupted."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .fitting import Samples
from .scorer import MinorityScorer

_SAVE_EVERY = 8  # batches


def score_dataset(
    scorer: MinorityScorer,
    data: Samples,
    *,
    batch_size: int = 64,
    seed: int = 0,
    device: str | torch.device = "cpu",
    path: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    class_labels: Tensor | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """Score every sample.

    Args:
        scorer: with a fixed level (`MinorityScorer.calibrated`): "auto" would choose another for every batch.
        data: (N, *E) in the model's units; a tensor, or anything indexable by a list.
        batch_size: samples per evaluation.
        seed: batch b draws its noise from ``seed`` and b alone.
        device: where the model is.
        path: safetensors file, written every few batches and resumed from when it exists; holds ``scores`` (N,).
        identity: JSON-native names of model and data; compared on resume.
        class_labels: (N,), to score within classes; see `MinorityScorer`.
        progress: called with the number of samples done.

    Returns:
        (N,) float32 on the CPU.

    Raises:
        ValueError: level "auto", or a file of another run, which is left untouched.
    """
    if scorer.level == "auto":
        raise ValueError("the scorer's level is 'auto': fix it for the whole data set with scorer.calibrated(samples)")
    n = len(data)
    settings = {**scorer.settings, **(identity or {}), "samples": n, "seed": seed, "batch_size": batch_size}
    scores, done = torch.zeros(n), 0
    if path is not None and path.is_file():
        scores, done = _resume(path, settings)
    progress(done)
    for b, start in enumerate(range(0, n, batch_size)):
        if start < done:
            continue
        rows = list(range(start, min(start + batch_size, n)))
        generator = torch.Generator().manual_seed((seed << 32) + b)
        classes = None if class_labels is None else class_labels[rows].to(device)
        scores[rows] = scorer(data[rows].to(device), generator, classes).float().cpu()
        done = rows[-1] + 1
        if path is not None and (b % _SAVE_EVERY == _SAVE_EVERY - 1 or done == n):
            _save(path, scores, done, settings)
        progress(done)
    return scores


def read_scores(path: Path) -> tuple[Tensor, dict[str, Any]]:
    """Scores (N,) and settings of a finished file of `score_dataset`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, or one that is not finished.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no scores {path}; `fewstep minority score` writes them")
    scores, done, settings = _read(path)
    if done < len(scores):
        raise ValueError(
            f"{path} holds {done} of {len(scores)} scores: run the same `fewstep minority score` again to finish it"
        )
    return scores, settings


def _read(path: Path) -> tuple[Tensor, int, dict[str, Any]]:
    with safe_open(path, framework="pt") as file:
        facts = json.loads((file.metadata() or {}).get("minority_scores", "null"))
        if facts is None:
            raise ValueError(f"{path} is not a file of minority scores")
        return file.get_tensor("scores"), facts["done"], facts["settings"]


def _resume(path: Path, settings: dict[str, Any]) -> tuple[Tensor, int]:
    scores, done, old = _read(path)
    if old != settings:
        changed = sorted(key for key in {*settings, *old} if old.get(key) != settings.get(key))
        raise ValueError(f"{path} holds the scores of another run ({', '.join(changed)} differ); choose another file")
    return scores, done


def _save(path: Path, scores: Tensor, done: int, settings: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".part")
    save_file({"scores": scores}, partial, metadata={"minority_scores": json.dumps({"done": done, "settings": settings})})
    partial.replace(path)

"""Sampling into a folder: numbered PNGs, a grid, and a record; resumes where it was interrupted."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from ..schedulers import swap
from .models import Conditioning, DiffusionPipeline, count_calls, generate
from .pictures import save_grid, save_image

RECORD = "samples.json"


def sample_folder(
    pipe: DiffusionPipeline,
    conditioning: Conditioning,
    sampler: str | Mapping[str, Any],
    out: Path,
    *,
    nfe: int,
    num: int,
    batch_size: int,
    seed: int,
    settings: Mapping[str, Any],
    progress: Callable[[int], None] = lambda done: None,
    inside: Callable[[DiffusionPipeline], AbstractContextManager[Any]] = lambda pipe: nullcontext(),
    after: Callable[[range], None] = lambda batch: None,
) -> dict[str, Any]:
    """Write ``num`` images, a grid of the first hundred and ``samples.json`` into ``out``.

    Image i depends on seed + i only. A folder that holds part of the same run is completed; one that holds another run is
    refused, untouched.

    Args:
        pipe: the pipeline.
        conditioning: what to generate.
        sampler: as in `samplers.schedulers.swap`.
        out: folder, made when missing.
        nfe: network evaluations per image.
        num: images.
        batch_size: images per pipeline call.
        seed: of image 0.
        settings: what identifies the run; kept in the record and compared on resume.
        progress: called with the number of images that are done.
        inside: a context to run the pipeline in, such as a corrector's.
        after: called with the image numbers of each finished batch.

    Returns:
        The record.

    Raises:
        ValueError: the folder holds another run, or is not a run's folder.
    """
    record_path = out / RECORD
    if record_path.is_file():
        old = json.loads(record_path.read_text())
        if old.get("settings") != dict(settings):
            changed = sorted(k for k in {*settings, *old["settings"]} if old["settings"].get(k) != settings.get(k))
            raise ValueError(f"{out} holds another run ({', '.join(changed)} differ); choose another --out")
    elif out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no {RECORD}; choose another --out")
    record: dict[str, Any] = {"settings": dict(settings), "complete": False}
    with swap(pipe, sampler) as scheduler, inside(pipe):
        # Once before anything is written, so that a schedule that does not fit leaves no trace.
        scheduler.set_timesteps(nfe, **({"mu": 1.0} if scheduler.config.use_dynamic_shifting else {}))
        assert scheduler.solver_schedule is not None
        out.mkdir(parents=True, exist_ok=True)
        record["schedule"] = scheduler.solver_schedule.to_dict()
        _write(record_path, record)
        todo = [i for i in range(num) if not (out / f"{i:05d}.png").is_file()]
        progress(num - len(todo))
        calls, batches = 0, 0
        while todo:
            batch = _run(todo, batch_size)
            with count_calls(pipe) as count:
                images = generate(pipe, conditioning, batch, steps=nfe, seed=seed)
            for i, image in zip(batch, images, strict=True):
                save_image(image, out / f"{i:05d}.png")
            after(batch)
            calls, batches, todo = calls + count.calls, batches + 1, todo[len(batch) :]
            progress(num - len(todo))
    shown = [_read(out / f"{i:05d}.png") for i in range(min(num, 100))]
    scale = max(1, 32 // shown[0].shape[-1])
    save_grid(torch.stack(shown), out / "grid.png", columns=min(10, num), scale=scale)
    if batches:
        record["counted_nfe"] = calls / batches
    record["complete"] = True
    _write(record_path, record)
    return record


def _read(path: Path) -> torch.Tensor:
    with Image.open(path) as image:
        return pil_to_tensor(image).float() / 255


def _run(todo: list[int], size: int) -> range:
    """The first consecutive numbers of ``todo``, at most ``size``."""
    end = 1
    while end < min(size, len(todo)) and todo[end] == todo[0] + end:
        end += 1
    return range(todo[0], todo[0] + end)


def _write(path: Path, record: Mapping[str, Any]) -> None:
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(path)

"""``fewstep sample``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import (
    BatchSizeOption,
    ClassLabelsOption,
    DeviceOption,
    DtypeOption,
    GuidanceOption,
    HeightOption,
    JsonOption,
    ModelOption,
    OfflineOption,
    PromptOption,
    PromptsOption,
    SeedOption,
    WidthOption,
    conditioning,
    out_console,
    progress_bar,
)
from .particles import Correction, ParticlesOption, PickOption, TargetOption, check


def sample(
    sampler: Annotated[str, typer.Option(help="Recipe text, path of a JSON schedule, or a shipped name.")],
    nfe: Annotated[int, typer.Option(min=1, help="Network evaluations per image.")],
    out: Annotated[Path, typer.Option(help="Folder for the images; an interrupted run in it is completed.")],
    num: Annotated[int, typer.Option(min=1, help="Number of images.")] = 16,
    model: ModelOption = "digits-conditional",
    prompt: PromptOption = None,
    prompts: PromptsOption = None,
    class_labels: ClassLabelsOption = None,
    guidance: GuidanceOption = None,
    height: HeightOption = None,
    width: WidthOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    batch_size: BatchSizeOption = 64,
    seed: SeedOption = 0,
    offline: OfflineOption = False,
    target: TargetOption = None,
    particles: ParticlesOption = 1,
    pick: PickOption = "sample",
    as_json: JsonOption = False,
) -> None:
    """Sample images with any solver schedule into a folder of PNGs."""
    from .. import evaluation
    from ..evaluation.folders import sample_folder

    fk = check(target, particles, pick, guidance)
    what = conditioning(prompt, prompts, class_labels, guidance, height, width)
    pipe = evaluation.load_pipeline(model, device=device, dtype=dtype, offline=offline)
    what.check(pipe)
    settings = {
        "model": model, "sampler": sampler, "nfe": nfe, "num": num, "seed": seed, "dtype": dtype, "prompts": list(what.prompts),
        "class_labels": list(what.class_labels), "guidance": guidance, "height": height, "width": width,
    }  # fmt: skip
    extra: dict[str, Any] = {}
    if fk is not None:
        settings |= {"target": target, "particles": particles, "pick": pick}
        correction = Correction(fk, particles, pick, out)
        extra, batch_size = {"inside": correction.inside, "after": correction.after}, max(1, batch_size // particles)
    with progress_bar() as bar:
        task = bar.add_task("images", total=num)
        record = sample_folder(
            pipe, what, sampler, out, nfe=nfe, num=num, batch_size=batch_size, seed=seed, settings=settings,
            progress=lambda done: bar.update(task, completed=done), **extra,
        )  # fmt: skip
    if as_json:
        typer.echo(json.dumps({**record, "out": str(out)}))
    else:
        of_each = "each" if fk is None else f"for each of the {particles} particles of an image"
        counted = f"{record['counted_nfe']:g} evaluations {of_each}" if "counted_nfe" in record else "already there"
        out_console.print(f"{num} images in {out} ({counted}); grid: {out / 'grid.png'}")

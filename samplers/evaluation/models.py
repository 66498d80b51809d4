"""Models by name: a reference pipeline that ships, a diffusers folder, or a hub id; and one way to call them all."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDPMPipeline, DiffusionPipeline, SchedulerMixin
from torch import Tensor

from .. import reference
from ..denoisers import network_of
from ..schedulers import swap

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

IN_TREE = "diffusers:"


class MissingModelError(FileNotFoundError):
    """A model's weights are not where they were looked for."""


def load_pipeline(model: str, *, device: str = "cpu", dtype: str = "float32", offline: bool = False) -> DiffusionPipeline:
    """Load a pipeline for sampling.

    Args:
        model: name of a reference pipeline, path of a diffusers folder, or hub id.
        device: torch device.
        dtype: "float32", "float16" or "bfloat16".
        offline: never reach for the hub.

    Raises:
        ValueError: unknown dtype.
        MissingModelError: no such model, with what to do.
    """
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    if model in reference.names():
        return _quiet(reference.load(model, DTYPES[dtype]).to(device))
    folder = Path(model)
    if folder.is_dir():
        index = folder / "model_index.json"
        if not index.is_file():
            raise MissingModelError(f"{model} is not a diffusers pipeline folder: it has no model_index.json")
        if json.loads(index.read_text()).get("_class_name") == "ClassConditionalPipeline":
            return _quiet(reference.load_folder(folder, DTYPES[dtype]).to(device))
    elif offline or model.startswith((".", "/")) or model.count("/") != 1:
        known = ", ".join(reference.names())
        hint = "; hub ids are not looked up with --offline" if offline else ""
        raise MissingModelError(f"no model folder {model!r}; reference pipelines that ship: {known}{hint}")
    try:
        pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=DTYPES[dtype], local_files_only=offline)
    except OSError as error:
        raise MissingModelError(f"could not load {model!r}: {str(error).splitlines()[0]}") from error
    return _quiet(pipe.to(device))


def _quiet(pipe: DiffusionPipeline) -> DiffusionPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def in_tree(pipe: DiffusionPipeline, class_name: str, options: Mapping[str, Any]) -> Iterator[SchedulerMixin]:
    """Run ``pipe`` with one of diffusers' own schedulers inside the block."""
    old = pipe.scheduler
    pipe.scheduler = getattr(diffusers, class_name).from_config(old.config, **options)
    try:
        yield pipe.scheduler
    finally:
        pipe.scheduler = old


def use_sampler(pipe: DiffusionPipeline, sampler: str) -> AbstractContextManager[SchedulerMixin]:
    """Run ``pipe`` with a sampler inside the block.

    Args:
        pipe: the pipeline.
        sampler: recipe text, path or name of a schedule, or one of diffusers' own as "diffusers:ClassName[:option=value,...]".

    Raises:
        ValueError: unknown sampler or class.
    """
    if not sampler.startswith(IN_TREE):
        return swap(pipe, sampler)
    name, _, rest = sampler.removeprefix(IN_TREE).partition(":")
    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise ValueError(f"{sampler!r}: diffusers has no scheduler {name}")
    if isinstance(pipe, DDPMPipeline) and "generator" not in inspect.signature(kind.step).parameters:
        raise ValueError(f"{sampler!r}: a DDPMPipeline cannot run {name}, whose steps take no generator")
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, _, value = part.partition("=")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
    return in_tree(pipe, name, options)


@dataclass
class CallCount:
    """Forward passes of the denoiser, and the largest batch among them."""

    calls: int = 0
    largest_batch: int = 0


@contextmanager
def count_calls(pipe: DiffusionPipeline) -> Iterator[CallCount]:
    """Count the denoiser's forward passes inside the block; a doubled guidance batch is one pass."""
    count = CallCount()

    def before(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        count.calls += 1
        state = args[0] if args else next((v for v in kwargs.values() if torch.is_tensor(v)), None)
        if torch.is_tensor(state):
            count.largest_batch = max(count.largest_batch, len(state))

    handle = network_of(pipe).register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield count
    finally:
        handle.remove()


@dataclass(frozen=True)
class Conditioning:
    """What to generate: prompts or class labels (image i takes entry i modulo their number), guidance, size."""

    prompts: Sequence[str] = ()
    class_labels: Sequence[int] = ()
    guidance: float | None = None
    height: int | None = None
    width: int | None = None

    def check(self, pipe: DiffusionPipeline) -> None:
        """Refuse what the pipeline cannot take, before any network call.

        Raises:
            ValueError: naming the option and the pipeline.
        """
        accepted, name = inspect.signature(pipe.__call__).parameters, type(pipe).__name__
        for option, value, key in (
            ("--prompt", self.prompts, "prompt"),
            ("--class-labels", self.class_labels, "class_labels"),
            ("--guidance", self.guidance is not None, "guidance_scale"),
            ("--height", self.height is not None, "height"),
            ("--width", self.width is not None, "width"),
        ):
            if value and key not in accepted:
                raise ValueError(f"{option} does not apply: {name} takes no {key}")
        classes = getattr(network_of(pipe).config, "num_class_embeds", None)
        wrong = sorted({label for label in self.class_labels if classes is not None and not 0 <= label < classes})
        if wrong:
            raise ValueError(f"--class-labels {wrong} are outside 0..{classes - 1} of this model")
        if "prompt" in accepted and not self.prompts:
            raise ValueError(f"{name} needs --prompt or --prompts")

    def arguments(self, pipe: DiffusionPipeline, images: range) -> dict[str, Any]:
        """The call's keyword arguments for these image numbers."""
        accepted = inspect.signature(pipe.__call__).parameters
        arguments: dict[str, Any] = {}
        if self.prompts:
            arguments["prompt"] = [self.prompts[i % len(self.prompts)] for i in images]
        elif "class_labels" in accepted:
            labels = list(self.class_labels) or list(range(10))
            arguments["class_labels"] = [labels[i % len(labels)] for i in images]
        elif "batch_size" in accepted:
            arguments["batch_size"] = len(images)
        if self.guidance is not None:
            arguments["guidance_scale"] = self.guidance
        for key in ("height", "width"):
            if getattr(self, key) is not None:
                arguments[key] = getattr(self, key)
        return arguments


def generate(pipe: DiffusionPipeline, conditioning: Conditioning, images: range, *, steps: int, seed: int) -> Tensor:
    """Run the pipeline for these image numbers; image i depends on seed + i only, not on the batch.

    Returns:
        (B, C, H, W) float32 in [0, 1] on the CPU.
    """
    generators = [torch.Generator("cpu").manual_seed(seed + i) for i in images]
    output = pipe(**conditioning.arguments(pipe, images), num_inference_steps=steps, generator=generators, output_type="np")
    return torch.from_numpy(output.images).permute(0, 3, 1, 2).float().contiguous()

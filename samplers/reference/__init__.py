"""Tiny pretrained reference pipelines that ship with the package, and the code that trained them."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel

from .binary_digits import binary_digits
from .digits import digit_images
from .pipeline import ClassConditionalPipeline
from .token_models import TokenModel, load_tokens

__all__ = [
    "ClassConditionalPipeline",
    "TokenModel",
    "binary_digits",
    "digit_images",
    "load",
    "load_folder",
    "load_tokens",
    "names",
]


def _models() -> Path:
    return Path(str(resources.files(__name__))) / "models"


def names() -> list[str]:
    """The reference pipelines that ship."""
    return sorted(path.name for path in _models().iterdir() if (path / "model_index.json").is_file())


def load(name: str, torch_dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """A reference pipeline: "digits" (a `DDPMPipeline`) or "digits-conditional" (a `ClassConditionalPipeline`).

    Both were trained on scikit-learn's handwritten digits (8x8 grey images in [-1, 1]) by `samplers.reference.digits`.

    Args:
        name: one of `names`.
        torch_dtype: of the weights; they are stored as float16.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    if name not in names():
        raise ValueError(f"unknown reference pipeline {name!r}; known: {', '.join(names())}")
    return load_folder(_models() / name, torch_dtype)


def load_folder(folder: str | Path, torch_dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """Load an unconditional or class-conditional U-Net pipeline from its folder.

    diffusers does not import pipeline classes from outside its own package, so the two parts are loaded one by one.

    Raises:
        FileNotFoundError: no such pipeline folder.
    """
    folder = Path(folder)
    index = folder / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(f"{folder} is not a pipeline folder: it has no model_index.json")
    pipeline = DDPMPipeline if json.loads(index.read_text())["_class_name"] == "DDPMPipeline" else ClassConditionalPipeline
    unet = UNet2DModel.from_pretrained(folder / "unet", torch_dtype=torch_dtype, use_safetensors=True).eval()
    pipe = pipeline(unet=unet, scheduler=DDPMScheduler.from_pretrained(folder / "scheduler"))
    pipe.set_progress_bar_config(disable=True)
    return pipe

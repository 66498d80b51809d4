"""The reference pipelines' recipe: handwritten digits (8x8, scikit-learn), two U-Nets, their seeds.

``python -m samplers.reference.digits`` trains both and writes them as diffusers folders with float16 weights. The data
are 1797 digits of the UCI optical recognition set that scikit-learn ships; every fifth image is held out.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from sklearn.datasets import load_digits
from torch import Tensor

from .pipeline import ClassConditionalPipeline
from .training import TrainingConfig, train_unet

CLASSES = 10
CONFIG = TrainingConfig(steps=6_000, batch=128, lr=2e-3, ema=0.999)


def digit_images(split: str = "train") -> tuple[Tensor, Tensor]:
    """The digits as (N, 1, 8, 8) float32 in [-1, 1] and their labels (N,) int64.

    Args:
        split: "train" (four fifths), "test" (every fifth image) or "all".
    """
    data = load_digits()
    images = torch.from_numpy(np.asarray(data.images, dtype=np.float32))[:, None] / 8.0 - 1.0
    labels = torch.from_numpy(np.asarray(data.target, dtype=np.int64))
    held_out = torch.arange(len(images)) % 5 == 0
    masks = {"train": ~held_out, "test": held_out, "all": torch.ones_like(held_out)}
    if split not in masks:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(masks)}")
    return images[masks[split]], labels[masks[split]]


def digit_unet(*, conditional: bool) -> UNet2DModel:
    """An untrained U-Net for 8x8 digits (0.7 M parameters); class 10 of the conditional one means "no class"."""
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
        norm_num_groups=8,
        num_class_embeds=CLASSES + 1 if conditional else None,
    )


def train_digits(out: Path, *, conditional: bool, config: TrainingConfig = CONFIG) -> Path:
    """Train one reference pipeline, save it under ``out`` as a diffusers folder, and return the folder."""
    torch.manual_seed(config.seed)
    images, labels = digit_images("train")
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    name = "digits-conditional" if conditional else "digits"
    out.mkdir(parents=True, exist_ok=True)
    unet = train_unet(
        digit_unet(conditional=conditional),
        images,
        labels if conditional else None,
        scheduler,
        config,
        out / f"{name}.checkpoint",
    )
    pipeline = ClassConditionalPipeline if conditional else DDPMPipeline
    folder = out / name
    pipeline(unet=unet.half(), scheduler=scheduler).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    here = Path("reference-models")
    for conditional in (False, True):
        print(train_digits(here, conditional=conditional))

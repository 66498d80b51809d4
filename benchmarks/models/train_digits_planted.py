"""Train the planted-digits model: handwritten digits of which 3% are inverted and another 3% have a bright corner.

    python benchmarks/models/train_digits_planted.py --work DIR [--steps 600]

Unconditional, on the 1437 training digits of scikit-learn and three copies of each moved by up to one pixel. Training goes on
from the reference pipeline "digits", which has seen neither attribute, and resumes from the checkpoint in DIR.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler
from torch import Tensor

from samplers.reference import digit_images, load
from samplers.reference.training import TrainingConfig, train_unet

ATTRIBUTES = ("inverted", "corner")
PLANTED_SHARE = 0.03
COPIES = 4


def planted_digits(seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """The training set: images (N, 1, 8, 8) in [-1, 1], and for each attribute which images have it, (N,) bool."""
    generator = torch.Generator().manual_seed(seed)
    digits, _ = digit_images("train")
    padded, copies = torch.nn.functional.pad(digits, (1, 1, 1, 1), value=-1.0), [digits]
    for _ in range(COPIES - 1):
        places = torch.randint(0, 3, (len(digits), 2), generator=generator).tolist()
        copies.append(torch.stack([image[:, i : i + 8, j : j + 8] for image, (i, j) in zip(padded, places, strict=True)]))
    x = torch.cat(copies)
    order = torch.randperm(len(x), generator=generator)
    count = round(PLANTED_SHARE * len(x))
    planted = {}
    for i, name in enumerate(ATTRIBUTES):
        planted[name] = torch.zeros(len(x), dtype=torch.bool)
        planted[name][order[i * count : (i + 1) * count]] = True
    x[planted["inverted"]] *= -1
    x[planted["corner"], :, :2, :2] = 1.0
    return x, planted


def detect(images: Tensor) -> dict[str, Tensor]:
    """Which images (B, 1, 8, 8) in [-1, 1] have each attribute, from their pixels alone."""
    border = images[..., [0, -1]].flatten(1).mean(1)
    corner = images[..., :2, :2].flatten(1).amin(1)
    inverted = border > 0.0
    return {"inverted": inverted, "corner": (corner > 0.0) & ~inverted}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    args = parser.parse_args()
    torch.manual_seed(0)
    images, _ = planted_digits()
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    args.work.mkdir(parents=True, exist_ok=True)
    config = TrainingConfig(steps=args.steps, batch=128, lr=5e-4, warmup=50, ema=0.99, save_every=50)
    unet = train_unet(load("digits").unet, images, None, scheduler, config, args.work / "digits-planted.checkpoint")
    DDPMPipeline(unet=unet.half(), scheduler=scheduler).save_pretrained(Path(__file__).parent / "digits-planted")


if __name__ == "__main__":
    main()

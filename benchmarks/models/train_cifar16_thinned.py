"""Train the thinned 16-pixel CIFAR-10 model: the six animals in full, automobiles and ships thinned to 1% of the set each.

    python benchmarks/models/train_cifar16_thinned.py --data cifar10-16px.npz --work DIR [--images 640000]

Unconditional and from scratch, so that nothing it knows of the rare classes comes from more than their 306 images. The data
file holds CIFAR-10 area-averaged to 16x16 (uint8 NHWC, keys train and train_labels). Training resumes from the checkpoint in
DIR; ``--export`` only writes the averaged weights reached so far beside this script.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor

from samplers.reference.training import TrainingConfig, train_unet

COMMON = {2: "bird", 3: "cat", 4: "deer", 5: "dog", 6: "frog", 7: "horse"}
RARE = {1: "automobile", 8: "ship"}
RARE_SHARE = 0.01


def thinned_images(path: Path) -> tuple[Tensor, Tensor]:
    """The thinned training set: images (N, 3, 16, 16) in [-1, 1] and CIFAR-10's own labels (N,)."""
    data = np.load(path)
    labels = torch.from_numpy(data["train_labels"]).long()
    full = sum(int((labels == label).sum()) for label in COMMON)
    kept = round(RARE_SHARE * full / (1 - len(RARE) * RARE_SHARE))
    rows = [(labels == label).nonzero().flatten() for label in COMMON]
    rows += [(labels == label).nonzero().flatten()[:kept] for label in RARE]
    index = torch.cat(rows)
    images = torch.from_numpy(data["train"][index.numpy()]).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    return images, labels[index]


def thinned_unet() -> UNet2DModel:
    """The untrained model, 1.1 M parameters."""
    return UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        norm_num_groups=8,
    )


def export(unet: UNet2DModel, scheduler: DDPMScheduler) -> None:
    """Write the pipeline folder with float16 weights."""
    DDPMPipeline(unet=unet.half(), scheduler=scheduler).save_pretrained(Path(__file__).parent / "cifar16-thinned")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--images", type=int, default=640_000, help="images seen in all")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--export", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    unet, scheduler = thinned_unet(), DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    checkpoint = args.work / "cifar16-thinned.checkpoint"
    if args.export:
        saved = torch.load(checkpoint, weights_only=True)
        for parameter, mean in zip(unet.parameters(), saved["average"]["shadow_params"], strict=True):
            parameter.data.copy_(mean)
        print("exporting step", saved["step"])
        return export(unet, scheduler)
    images, _ = thinned_images(args.data)
    args.work.mkdir(parents=True, exist_ok=True)
    config = TrainingConfig(steps=args.images // args.batch, batch=args.batch, lr=1e-3, ema=0.999, flip=True, save_every=200)
    export(train_unet(unet, images, None, scheduler, config, checkpoint), scheduler)


if __name__ == "__main__":
    main()

"""Train the 16-pixel CIFAR-10 benchmark model: class-conditional, class 10 means "no class".

    python benchmarks/models/train_cifar16.py --data cifar10-16px.npz --work DIR [--images 640000]

The data file holds CIFAR-10 area-averaged to 16x16 (uint8 NHWC, keys train and train_labels). Training resumes from the
checkpoint in DIR; ``--export`` only writes the averaged weights reached so far beside this script.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DModel

from samplers.reference.pipeline import ClassConditionalPipeline
from samplers.reference.training import TrainingConfig, train_unet


def cifar_unet() -> UNet2DModel:
    """The untrained model, 2.6 M parameters."""
    return UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        norm_num_groups=8,
        num_class_embeds=11,
    )


def export(unet: UNet2DModel, scheduler: DDPMScheduler, out: Path) -> None:
    """Write the pipeline folder with float16 weights."""
    ClassConditionalPipeline(unet=unet.half(), scheduler=scheduler).save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--images", type=int, default=640_000, help="images seen in all")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--bf16", action="store_true", help="autocast, where the hardware has bfloat16 matrix units")
    parser.add_argument("--export", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    unet, scheduler = cifar_unet(), DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    out = Path(__file__).parent / "cifar16"
    checkpoint = args.work / "cifar16.checkpoint"
    if args.export:
        saved = torch.load(checkpoint, weights_only=True)
        for parameter, mean in zip(unet.parameters(), saved["average"]["shadow_params"], strict=True):
            parameter.data.copy_(mean)
        print("exporting step", saved["step"])
        return export(unet, scheduler, out)
    data = np.load(args.data)
    images = torch.from_numpy(data["train"]).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    labels = torch.from_numpy(data["train_labels"]).long()
    args.work.mkdir(parents=True, exist_ok=True)
    config = TrainingConfig(
        steps=args.images // args.batch, batch=args.batch, lr=1e-3, ema=0.999, flip=True, bf16=args.bf16, save_every=200
    )
    export(train_unet(unet, images, labels, scheduler, config, checkpoint), scheduler, out)


if __name__ == "__main__":
    main()

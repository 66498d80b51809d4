"""The judge of the minority benchmark's CIFAR part: a classifier that neither scores nor guides."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from minority_record import Row
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from train_cifar16_thinned import COMMON, RARE

STEPS = 1500


def judge_network() -> nn.Module:
    """The untrained judge: (B, 3, 16, 16) -> (B, 10) logits."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]

    layers = [*block(3, 32), *block(32, 64), nn.MaxPool2d(2), *block(64, 128), nn.MaxPool2d(2), *block(128, 128)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def images_of(data: Path, split: str) -> tuple[Tensor, Tensor]:
    """All images of the eight classes of one split, in [-1, 1], and their labels."""
    file = np.load(data)
    labels = torch.from_numpy(file[f"{split}_labels"]).long()
    rows = torch.isin(labels, torch.tensor([*COMMON, *RARE]))
    images = torch.from_numpy(file[split][rows.numpy()]).permute(0, 3, 1, 2).float() / 127.5 - 1
    return images, labels[rows]


def trained_judge(data: Path, path: Path) -> nn.Module:
    """The judge, trained once on all images of the eight classes, thinned or not, and kept."""
    judge = judge_network()
    if path.is_file():
        judge.load_state_dict(load_file(path))
        return judge.eval()
    torch.manual_seed(0)
    images, labels = images_of(data, "train")
    optimiser = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=STEPS)
    for _ in range(STEPS):
        rows = torch.randint(len(images), (128,))
        x = torch.where(torch.rand(len(rows), 1, 1, 1) < 0.5, images[rows].flip(-1), images[rows])
        loss = nn.functional.cross_entropy(judge(x), labels[rows], label_smoothing=0.05)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    save_file({name: value.contiguous() for name, value in judge.state_dict().items()}, path)
    return judge.eval()


@torch.no_grad()
def rare_shares(judge: nn.Module, x: Tensor) -> Row:
    """Shares of the rare classes among images, according to the judge."""
    found = torch.cat([judge(part).argmax(1) for part in x.split(512)])
    return {name: (found == label).double().mean().item() for label, name in RARE.items()}

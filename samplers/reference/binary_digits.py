"""The discrete reference models' recipe: black-and-white handwritten digits (8x8, scikit-learn), two residual MLPs, seeds.

``python -m samplers.reference.binary_digits`` trains both, the masked and the uniform-state model, and writes their folders
with float16 weights. Data and split are those of `digit_images`; a pixel is ink where the grey value is at least half.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .digits import digit_images
from .token_training import TokenTraining, train_tokens
from .tokens import TokenMLP, save_network

LENGTH = 64
TRAINING = {
    "masked": TokenTraining(process="masked", steps=5_000, batch=128, lr=2e-3, weight_decay=0.1),
    "uniform": TokenTraining(process="uniform", steps=5_000, batch=128, lr=2e-3, weight_decay=0.1),
}


def binary_digits(split: str = "train") -> Tensor:
    """Digits as ids (N, 64), 1 for ink; splits as in `digit_images`."""
    return (digit_images(split)[0] >= 0.0).long().flatten(1)


def digit_network(process: str) -> TokenMLP:
    """An untrained network; the uniform-state one is told the noise level."""
    return TokenMLP(vocab=2, seq_len=LENGTH, width=320, depth=3, time=process == "uniform")


def train_binary_digits(out: Path, process: str, config: TokenTraining | None = None) -> Path:
    """Train one model, save it as ``out/binary-digits-PROCESS``, and return the folder."""
    torch.manual_seed(0)
    data, name = binary_digits("train"), f"binary-digits-{process}"

    def draw(batch: int, generator: torch.Generator) -> Tensor:
        """Random digits, each moved by one pixel now and then: 1437 pictures are few."""
        x = data[torch.randint(len(data), (batch,), generator=generator)].view(-1, 8, 8)
        up, left = torch.rand(2, batch, 1, 1, generator=generator)
        moved = torch.where(up < 0.1, torch.nn.functional.pad(x, (0, 0, 0, 1))[:, 1:], x)
        moved = torch.where(left < 0.1, torch.nn.functional.pad(moved, (0, 1))[:, :, 1:], moved)
        return moved.flatten(1)

    out.mkdir(parents=True, exist_ok=True)
    network = train_tokens(digit_network(process), draw, config or TRAINING[process], out / f"{name}.checkpoint")
    return save_network(network, out / name, process=process, vocab=2, seq_len=LENGTH)


if __name__ == "__main__":
    for process in ("masked", "uniform"):
        print(train_binary_digits(Path("reference-models"), process))

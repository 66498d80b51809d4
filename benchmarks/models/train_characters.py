"""Train the character model of the discrete benchmark: masked diffusion over windows of 64 characters, 2.2 M parameters.

    python benchmarks/models/train_characters.py --data tinyshakespeare.txt --work DIR [--steps 3600]

The last tenth of the text is held out. Training resumes from the checkpoint in DIR; ``--export`` only writes the averaged
weights reached so far beside this script.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from samplers.reference.token_training import TokenTraining, train_tokens
from samplers.reference.tokens import TokenTransformer, save_network

LENGTH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--export", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    text = args.data.read_text(encoding="utf-8")
    symbols = "".join(sorted(set(text)))
    ids = torch.tensor([symbols.index(c) for c in text])
    train = ids[: len(ids) * 9 // 10]
    network = TokenTransformer(len(symbols), LENGTH)
    args.work.mkdir(parents=True, exist_ok=True)
    checkpoint = args.work / "characters.checkpoint"
    config = TokenTraining(steps=args.steps, batch=32, lr=2e-3, decay=0.995, save_every=50)
    if args.export:
        saved = torch.load(checkpoint, weights_only=True)
        network.load_state_dict(saved["average"])
        print("exporting step", saved["step"])
    else:

        def draw(batch: int, generator: torch.Generator) -> torch.Tensor:
            start = torch.randint(len(train) - LENGTH, (batch, 1), generator=generator)
            return train[start + torch.arange(LENGTH)]

        network = train_tokens(network, draw, config, checkpoint, log=lambda line: print(line, flush=True))
    save_network(network, Path(__file__).parent / "characters", process="masked", seq_len=LENGTH, symbols=symbols)


if __name__ == "__main__":
    main()

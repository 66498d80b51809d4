"""Load the token models that ship, and others in the same layout, ready to sample."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..discrete import LogitsModel, Process, from_logits, process_from_dict
from .tokens import TokenMLP, TokenTransformer, load_network


@dataclass(frozen=True)
class TokenModel:
    """A denoiser with what sampling needs to know about it: ``model(x, t)`` -> posterior (B, L, V).

    Attributes:
        network: the raw network of logits.
        process: its noising process.
        seq_len: its sequence length.
        config: everything else its folder says, such as ``symbols``.
    """

    network: TokenMLP | TokenTransformer
    process: Process
    seq_len: int
    config: dict[str, Any]

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The posterior."""
        return self.model(x, t)

    def tempered(self, x: Tensor, t: Tensor, exponent: float | Tensor) -> Tensor:
        """The posterior to the power of ``exponent``, normalised."""
        return self.model.tempered(x, t, exponent)

    @property
    def model(self) -> LogitsModel:
        """The network as a model."""
        return from_logits(self.network, self.process, time="noise_ratio" if self.network.config["time"] else "none")

    @property
    def device(self) -> torch.device:
        """Where the network lives."""
        return next(self.network.parameters()).device

    def decode(self, ids: Tensor) -> list[str]:
        """Sequences (n, L) as text: the config's symbols, else digits."""
        symbols = self.config.get("symbols", "0123456789abcdefghijklmnopqrstuvwxyz")
        return ["".join(symbols[i] for i in row) for row in ids.tolist()]


def load_tokens(source: str | Path, dtype: torch.dtype = torch.float32) -> TokenModel:
    """A token model: "binary-digits-masked", "binary-digits-uniform", or a folder that `save_network` wrote.

    Raises:
        ValueError: unknown name; the message lists the known ones.
        FileNotFoundError: a folder without a model.
    """
    shipped = Path(__file__).parent / "models"
    known = sorted(path.parent.name for path in shipped.glob("*/config.json"))
    folder = shipped / str(source) if str(source) in known else Path(source)
    if not folder.is_dir():
        raise ValueError(f"unknown token model {str(source)!r}; known: {', '.join(known)}, or a folder with config.json")
    network, config = load_network(folder, dtype)
    head = {"process": config.get("process"), "vocab": network.config["vocab"], "schedule": config.get("schedule", {})}
    return TokenModel(network, process_from_dict(head), int(network.config["seq_len"]), config)

"""Small networks over token ids for discrete diffusion, and their folders: config.json beside model.safetensors.

Both networks map ids (B, L), the mask id included, and an optional level (B,) in [0, 1] to logits (B, L, vocab).
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F


class TokenMLP(nn.Module):
    """Residual MLP over a fixed number of sites: for pictures and puzzles of a few dozen tokens.

    Args:
        vocab: number of data tokens; ids run to ``vocab`` (the mask) inclusive.
        seq_len: number of sites L.
        width: hidden width.
        depth: number of residual blocks.
        time: whether the network is told the noise level (uniform-state models need it; masked ones can count).
    """

    def __init__(self, vocab: int, seq_len: int, width: int = 384, depth: int = 3, time: bool = False) -> None:
        """Build the layers."""
        super().__init__()
        self.config = {"vocab": vocab, "seq_len": seq_len, "width": width, "depth": depth, "time": time}
        self.first = nn.Linear(seq_len * (vocab + 1), width)
        self.level = nn.Linear(16, width) if time else None
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.up = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.last = nn.Linear(width, seq_len * vocab)

    def forward(self, ids: Tensor, level: Tensor | None = None) -> Tensor:
        """Logits (B, L, vocab) of the clean tokens."""
        vocab, seq_len = self.config["vocab"], self.config["seq_len"]
        weight = self.first.weight
        h = self.first(F.one_hot(ids, vocab + 1).flatten(1).to(weight.dtype))
        if self.level is not None:
            h = h + self.level(_waves(_given(level), 16).to(weight.dtype))
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            h = h + down(F.gelu(up(norm(h))))
        return self.last(h).unflatten(1, (seq_len, vocab))


class TokenTransformer(nn.Module):
    """Bidirectional transformer with a depthwise convolution in every block, which learns spelling early.

    Args:
        vocab: number of data tokens; ids run to ``vocab`` (the mask) inclusive.
        seq_len: longest sequence.
        width: model width, a multiple of 32 (the size of a head).
        depth: number of blocks.
        time: whether the network is told the noise level.
    """

    def __init__(self, vocab: int, seq_len: int, width: int = 160, depth: int = 7, time: bool = False) -> None:
        """Build the layers."""
        super().__init__()
        self.config = {"vocab": vocab, "seq_len": seq_len, "width": width, "depth": depth, "time": time}
        self.token = nn.Embedding(vocab + 1, width)
        self.place = nn.Embedding(seq_len, width)
        self.level = nn.Linear(16, width) if time else None
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.last = nn.Linear(width, vocab)
        for embedding in (self.token, self.place):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, ids: Tensor, level: Tensor | None = None) -> Tensor:
        """Logits (B, L, vocab) of the clean tokens."""
        h = self.token(ids) + self.place.weight[: ids.shape[1]]
        if self.level is not None:
            h = h + self.level(_waves(_given(level), 16).to(h.dtype))[:, None]
        for block in self.blocks:
            h = block(h)
        return self.last(self.norm(h))


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.near = nn.Conv1d(width, width, 7, padding=3, groups=width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.near(self.norms[0](h).transpose(1, 2)).transpose(1, 2)
        q, k, v = (part.unflatten(2, (-1, 32)).transpose(1, 2) for part in self.qkv(self.norms[1](h)).chunk(3, dim=2))
        h = h + self.mix(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return h + self.down(F.gelu(self.up(self.norms[2](h))))


def _given(level: Tensor | None) -> Tensor:
    if level is None:
        raise ValueError("this network was built with time=True: call it with the noise level (B,) in [0, 1]")
    return level


def _waves(level: Tensor, size: int) -> Tensor:
    """Sine and cosine features (B, size) of a level in [0, 1]."""
    frequencies = torch.pi * 2.0 ** torch.arange(size // 2, device=level.device)
    angle = level.float()[:, None] * frequencies
    return torch.cat([angle.sin(), angle.cos()], dim=1)


KINDS = {"mlp": TokenMLP, "transformer": TokenTransformer}


def save_network(network: TokenMLP | TokenTransformer, folder: Path, **extra: object) -> Path:
    """Write ``folder/config.json`` (with ``extra`` beside the network's arguments) and float16 weights."""
    kind = next(name for name, cls in KINDS.items() if isinstance(network, cls))
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.half().contiguous() for name, value in network.state_dict().items()}, folder / "model.safetensors")
    text = json.dumps({"kind": kind, "network": network.config} | extra, indent=1)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    return folder


def load_network(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[TokenMLP | TokenTransformer, dict]:
    """The network of a folder that `save_network` wrote, in eval mode, and the rest of its config.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: the config names an unknown kind of network.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a token model: it has no config.json")
    config = json.loads(path.read_text(encoding="utf-8"))
    kind = config.pop("kind", None)
    if kind not in KINDS:
        raise ValueError(f"{path} names the unknown kind of network {kind!r}; known: {', '.join(KINDS)}")
    network = KINDS[kind](**config.pop("network"))
    network.load_state_dict(load_file(folder / "model.safetensors"))
    return network.to(dtype).eval().requires_grad_(False), config

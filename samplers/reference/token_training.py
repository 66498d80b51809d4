"""Train a token network as the denoiser of a masked or uniform-state diffusion model.

Masked: cross-entropy on the masked sites, weighted 1/t, the likelihood bound of masked diffusion (Sahoo et al. 2024,
arXiv:2406.07524, eq. 10). Uniform-state: cross-entropy of the clean token at every site, whose minimiser is the posterior
that the reverse rates need. Seeded; resumes from its checkpoint with the same result as an unbroken run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from .tokens import TokenMLP, TokenTransformer


@dataclass(frozen=True)
class TokenTraining:
    """Settings of one run; ``steps`` counts optimiser updates of ``batch`` sequences each."""

    process: str = "masked"
    steps: int = 6_000
    batch: int = 128
    lr: float = 1e-3
    warmup: int = 200
    decay: float = 0.999
    weight_decay: float = 0.01
    seed: int = 0
    save_every: int = 250


def train_tokens(
    network: TokenMLP | TokenTransformer,
    draw: Callable[[int, torch.Generator], Tensor],
    config: TokenTraining,
    checkpoint: Path,
    log: Callable[[str], None] = print,
) -> TokenMLP | TokenTransformer:
    """Train ``network`` and return it with its averaged weights.

    Args:
        network: ``network(ids, level)`` -> logits; the level is the noise level t in [0, 1] if it takes one.
        draw: ``draw(batch, generator)`` -> clean ids (batch, L).
        config: the run's settings.
        checkpoint: file written every ``save_every`` steps and resumed from when it exists.
        log: receives one line per ``save_every`` steps.

    Raises:
        ValueError: ``config.process`` is neither "masked" nor "uniform".
    """
    if config.process not in ("masked", "uniform"):
        raise ValueError(f"unknown process {config.process!r}; known: masked, uniform")
    generator = torch.Generator().manual_seed(config.seed)
    optimiser = torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.98))
    average, start = deepcopy(network), 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        network.load_state_dict(saved["network"])
        average.load_state_dict(saved["average"])
        optimiser.load_state_dict(saved["optimiser"])
        generator.set_state(saved["rng"])
        start = int(saved["step"])
    total, clock = torch.zeros(()), time.monotonic()
    network.train()
    for step in range(start, config.steps):
        loss = _loss(network, draw(config.batch, generator), config.process, generator)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for group in optimiser.param_groups:
            group["lr"] = config.lr * _ramp(step, config)
        optimiser.step()
        done = step + 1
        decay = min(config.decay, (1 + done) / (10 + done))
        with torch.no_grad():
            for mean, value in zip(average.parameters(), network.parameters(), strict=True):
                mean.lerp_(value, 1.0 - decay)
        total += loss.detach()
        if done % config.save_every == 0 or done == config.steps:
            spent = time.monotonic() - clock
            mean_loss, pace = total.item() / config.save_every, spent / config.save_every
            log(f"step {done}/{config.steps}  loss {mean_loss:.4f}  {pace:.3f} s/step")
            total, clock = torch.zeros(()), time.monotonic()
            parts = {"network": network.state_dict(), "average": average.state_dict(), "optimiser": optimiser.state_dict()}
            partial = checkpoint.with_suffix(".part")
            torch.save(parts | {"rng": generator.get_state(), "step": done}, partial)
            partial.replace(checkpoint)
    return average.eval()


def _ramp(step: int, config: TokenTraining) -> float:
    """Linear warm-up, then a cosine to one twentieth."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return 0.05 + 0.95 * 0.5 * (1.0 + math.cos(math.pi * done))


def _loss(network: TokenMLP | TokenTransformer, x0: Tensor, process: str, generator: torch.Generator) -> Tensor:
    """Stratified noise levels over the batch; noisy ids from the process with survival 1 - t."""
    batch, length = x0.shape
    vocab = network.config["vocab"]
    t = ((torch.arange(batch) + torch.rand(batch, generator=generator)) / batch).clamp(min=0.5 / length)
    hit = torch.rand(x0.shape, generator=generator) < t[:, None]
    if process == "masked":
        noisy = x0.masked_fill(hit, vocab)
    else:
        noisy = torch.where(hit, torch.randint(vocab, x0.shape, generator=generator), x0)
    logits = network(noisy, t) if network.config["time"] else network(noisy)
    losses = F.cross_entropy(logits.flatten(0, 1), x0.flatten(), reduction="none").view_as(x0)
    if process == "masked":
        losses = losses * hit / t[:, None]
    return losses.mean()

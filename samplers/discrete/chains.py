"""Exact denoiser of a Markov chain at any length: the smoother of a hidden Markov model."""

from __future__ import annotations

import torch
from torch import Tensor

from .processes import Process
from .survival import Time
from .tabular import evidence


class MarkovModel:
    """Exact posterior, log probability and n-gram laws of a homogeneous Markov chain over tokens.

    Attributes:
        initial: (V,) law of the first token, float64.
        step: (V, V) transition probabilities, row = from, float64.
        process: the noising process.
    """

    def __init__(self, initial: Tensor, step: Tensor, process: Process) -> None:
        """Take the first token's law (V,) and the transition matrix (V, V).

        Raises:
            ValueError: wrong shapes, rows that do not sum to one, or zero transitions (a masked state that contradicts
                the chain would have no posterior; give them a small probability).
        """
        vocab = process.vocab
        if initial.shape != (vocab,) or step.shape != (vocab, vocab):
            raise ValueError(
                f"need shapes ({vocab},) and ({vocab}, {vocab}), got {tuple(initial.shape)} and {tuple(step.shape)}"
            )
        rows = torch.cat([initial[None], step]).double()
        if bool((rows <= 0).any()) or float((rows.sum(-1) - 1.0).abs().max()) > 1e-6:
            raise ValueError("initial and every row of step must be positive and sum to one")
        self.initial, self.step, self.process = initial.double(), step.double(), process

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        """Posterior (B, L, V), float64, by the forward-backward recursion."""
        clues = evidence(self.process, x, t).expand(*x.shape, self.process.vocab)
        length = x.shape[1]
        forward, message = [], self.initial.expand(len(x), -1)
        for i in range(length):
            here = message * clues[:, i]
            here = here / here.sum(-1, keepdim=True)
            forward.append(here)
            message = here @ self.step
        back, posterior = torch.ones_like(forward[-1]), []
        for i in reversed(range(length)):
            joint = forward[i] * back
            posterior.append(joint / joint.sum(-1, keepdim=True))
            back = (clues[:, i] * back) @ self.step.T
            back = back / back.sum(-1, keepdim=True)
        return torch.stack(posterior[::-1], dim=1)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log probability (B,) of clean sequences (B, L)."""
        return self.initial.log()[x[:, 0]] + self.step.log()[x[:, :-1], x[:, 1:]].sum(-1)

    def sample(self, n: int, length: int, generator: torch.Generator | None = None) -> Tensor:
        """Sequences (n, length) of the chain."""
        x = [torch.multinomial(self.initial, n, replacement=True, generator=generator)]
        for _ in range(length - 1):
            x.append(torch.multinomial(self.step[x[-1]], 1, generator=generator)[:, 0])
        return torch.stack(x, dim=1)

    def law(self, length: int) -> Tensor:
        """The law of the first ``length`` tokens as a table (V,) * length."""
        table = self.initial
        for _ in range(length - 1):
            table = table[..., None] * self.step
        return table

    def entropy(self, length: int) -> float:
        """Entropy of a sequence in nats."""
        total, marginal = -(self.initial * self.initial.log()).sum(), self.initial
        local = -(self.step * self.step.log()).sum(-1)
        for _ in range(length - 1):
            total = total + (marginal * local).sum()
            marginal = marginal @ self.step
        return float(total)

    def ngram_law(self, n: int, length: int) -> Tensor:
        """Law (V,) * n of ``n`` neighbours, averaged over the places of a sequence of ``length`` tokens."""
        if not 1 <= n <= length:
            raise ValueError(f"n must be between 1 and the length {length}, got {n}")
        total, marginal = torch.zeros_like(self.initial), self.initial
        for _ in range(length - n + 1):
            total = total + marginal
            marginal = marginal @ self.step
        table = total / (length - n + 1)
        for _ in range(n - 1):
            table = table[..., None] * self.step
        return table

"""Exact denoisers of laws that can be written down: any law on few sequences, and mixtures of product laws.

A *model* of this package is a callable ``model(x, t) -> D`` from ids x (B, L) and a time (0-d or (B,)) to the posterior
D (B, L, V). These are exact to float64 rounding and differentiable in t.

Masked states that no sequence of the law agrees with (a factorised sampler can reach them) have no posterior. They get the
limit of a law that leaks a little to everything: the sequences with the fewest disagreements, in their own proportions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels import one_hot
from .processes import MaskedProcess, Process
from .survival import Time

LIMIT = 1e3  # log weight of one impossible site: negligible beside any possible one, finite so that the fewest win
ENUMERABLE = 300_000  # sequences of a dense table


class SupportModel:
    """Exact posterior of a law with listed sequences: a table, a rule's solutions, a data set.

    Attributes:
        points: (N, L) sequences of positive probability.
        weights: (N,) their probabilities, float64.
        process: the noising process.
    """

    def __init__(self, points: Tensor, process: Process, weights: Tensor | None = None) -> None:
        """Take N sequences (N, L) with weights (N,), equal by default.

        Raises:
            ValueError: ids outside the vocabulary, or weights that are no law.
        """
        if points.ndim != 2 or points.numel() == 0:
            raise ValueError(f"points must be (N, L) with N, L >= 1, got shape {tuple(points.shape)}")
        if int(points.min()) < 0 or int(points.max()) >= process.vocab:
            raise ValueError(
                f"ids run from {int(points.min())} to {int(points.max())}; the vocabulary is 0 .. {process.vocab - 1}"
            )
        weights = torch.ones(len(points)) if weights is None else weights
        if weights.shape != points.shape[:1] or bool((weights <= 0).any()) or not bool(torch.isfinite(weights).all()):
            raise ValueError("weights must be one positive finite number per point")
        self.points, self.process = points, process
        self.weights = weights.double() / weights.double().sum()
        self._hot = one_hot(points, process.vocab, self.weights).flatten(1)  # (N, L V)

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        """Posterior (B, L, V), float64."""
        check_length(x, self.points.shape[1])
        logs = self.weights.log() + self.agreement(x, t)
        return (logs.softmax(-1) @ self._hot).unflatten(-1, (x.shape[1], self.process.vocab))

    def agreement(self, x: Tensor, t: Time) -> Tensor:
        """Log probability (B, N) of reaching x from every point, up to a constant per row."""
        vocab, process = self.process.vocab, self.process
        if isinstance(process, MaskedProcess):
            revealed = (x != process.mask_id).sum(-1, keepdim=True)
            same = one_hot(x, vocab + 1, self.weights)[..., :vocab].flatten(1) @ self._hot.T
            return LIMIT * (same - revealed)
        same = one_hot(x, vocab, self.weights).flatten(1) @ self._hot.T
        alpha = process.alpha(t)
        alpha = alpha if alpha.ndim == 0 else alpha[:, None]
        gain = torch.log1p(alpha * vocab / (1.0 - alpha).clamp(min=1e-300)).clamp(max=LIMIT)
        return gain * (same - x.shape[1])

    def log_prob(self, x: Tensor) -> Tensor:
        """Log probability (B,) of clean sequences (B, L); -inf off the support."""
        same = (one_hot(x, self.process.vocab, self.weights).flatten(1) @ self._hot.T).round() == x.shape[1]
        return torch.where(same, self.weights, 0.0).sum(-1).log()

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Sequences (n, L) from the law."""
        return self.points[torch.multinomial(self.weights, n, replacement=True, generator=generator)]


class TabularModel(SupportModel):
    """Exact posterior of any law over V^L that fits in memory.

    Attributes:
        law: (V,) * L, sums to one.
    """

    def __init__(self, law: Tensor, process: Process) -> None:
        """Take the law (V,) * L.

        Raises:
            ValueError: the law's shape is not (V,) * L with the process's V, it is no law, or it is too large.
        """
        if law.ndim < 1 or set(law.shape) != {process.vocab}:
            raise ValueError(f"a law over sequences has shape (V,) * L with V = {process.vocab}, got {tuple(law.shape)}")
        if law.numel() > ENUMERABLE:
            raise ValueError(f"the table has {law.numel()} entries, the limit is {ENUMERABLE}; use MarkovModel or SupportModel")
        law = law.double()
        if bool((law < 0).any()) or abs(float(law.sum()) - 1.0) > 1e-5:
            raise ValueError(f"a law is non-negative and sums to one; this one sums to {float(law.sum()):.6g}")
        self.law = law
        support = law.nonzero()
        super().__init__(support, process, law[tuple(support.T)])


class ProductMixtureModel:
    """Exact posterior, at any length, of a mixture of product laws.

    Attributes:
        weights: (K,) mixture weights, float64.
        sites: (K, L, V) token probabilities of each component, float64.
        process: the noising process.
    """

    def __init__(self, weights: Tensor, sites: Tensor, process: Process) -> None:
        """Take the weights (K,) and site laws (K, L, V).

        Raises:
            ValueError: shapes that do not fit, or rows that do not sum to one.
        """
        if sites.ndim != 3 or sites.shape[-1] != process.vocab or weights.shape != sites.shape[:1]:
            raise ValueError(
                f"need weights (K,) and sites (K, L, {process.vocab}), got {tuple(weights.shape)} and {tuple(sites.shape)}"
            )
        if not torch.allclose(sites.sum(-1).double(), torch.ones(sites.shape[:2], dtype=torch.float64), atol=1e-6):
            raise ValueError("every sites[k, i] must sum to one")
        self.weights, self.sites, self.process = weights.double() / weights.double().sum(), sites.double(), process

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        """Posterior (B, L, V), float64."""
        check_length(x, self.sites.shape[1])
        joint = self.sites * evidence(self.process, x, t)[:, None]  # (B, K, L, V)
        total = joint.sum(-1)
        component = (self.weights.log() + total.log().sum(-1)).softmax(-1)
        return torch.einsum("bk,bklv->blv", component, joint / total[..., None])

    def law(self) -> Tensor:
        """The law as a table (V,) * L; for short sequences."""
        table = self.weights
        for i in range(self.sites.shape[1]):
            table = table[..., None] * self.sites[:, i].reshape(-1, *[1] * i, self.process.vocab)
        return table.sum(0)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Sequences (n, L) from the law."""
        rows = self.sites[torch.multinomial(self.weights, n, replacement=True, generator=generator)]
        return torch.multinomial(rows.flatten(0, 1), 1, generator=generator).view(n, -1)


def check_length(x: Tensor, length: int) -> None:
    """Refuse ids (B, L) of another length than the law's."""
    if x.ndim != 2 or x.shape[1] != length:
        raise ValueError(f"this law is over sequences of {length} tokens: ids must be (B, {length}), got {tuple(x.shape)}")


def evidence(process: Process, x: Tensor, t: Time) -> Tensor:
    """Likelihood (B, L, V) of each clean token at each site: p(x_i | x0_i), up to a factor per site for masked."""
    if isinstance(process, MaskedProcess):
        hidden = (x == process.mask_id)[..., None]
        like = torch.zeros((), dtype=torch.float64)
        return torch.where(hidden, 1.0, one_hot(x, process.vocab, like))
    alpha = process.alpha(t)
    alpha = alpha if alpha.ndim == 0 else alpha.view(-1, 1, 1)
    return alpha * one_hot(x, process.vocab, alpha) + (1.0 - alpha) / process.vocab

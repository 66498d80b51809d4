r"""The two noising processes of discrete diffusion, and the exact formulas both directions need.

Ids x are (B, L) int64. A *posterior* D (B, L, V) holds $D_{iv} = p(x_{0,i} = v \mid x_t)$, given every site of $x_t$. The
reverse process jumps at site i to y with rate $r_{iy} = \sigma(t) Q(y \to x_i) s_{iy}$, where the concrete score is
$s_{iy} = p_t(x^{i \to y}) / p_t(x)$ (Lou et al. 2024, arXiv:2310.16834). Times are floats, 0-d tensors, or one per row (B,).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .kernels import one_hot, uniform
from .survival import SurvivalSchedule, Time, as_float64


def _rows(value: Tensor, like: Tensor) -> Tensor:
    """A 0-d, (B,) or (B, L, 1) number so that it broadcasts against ``like`` (B, L, S)."""
    return value if value.ndim in (0, like.ndim) else value.to(like).view(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True)
class _Process:
    vocab: int
    schedule: SurvivalSchedule = field(default_factory=SurvivalSchedule)

    def __post_init__(self) -> None:
        if self.vocab < 2:
            raise ValueError(f"vocab must be at least 2 tokens, got {self.vocab}")

    def alpha(self, t: Time) -> Tensor:
        """Probability that a token is still untouched at t, float64."""
        return self.schedule.alpha(t)

    def corrupt(self, x0: Tensor, t: Time, generator: torch.Generator | None = None) -> Tensor:
        """A draw of x_t (B, L) from clean ids x0 (B, L); t is one number or one per row."""
        alpha = as_float64(self.alpha(t))
        survive = uniform(x0.shape, x0, generator) < (alpha if alpha.ndim == 0 else alpha[:, None])
        return torch.where(survive, x0, self.prior(tuple(x0.shape), generator, device=x0.device))

    def to_dict(self) -> dict[str, Any]:
        """JSON form; `process_from_dict` reads it back."""
        return {"process": self.name, "vocab": self.vocab, "schedule": self.schedule.to_dict()}


@dataclass(frozen=True)
class MaskedProcess(_Process):
    """Absorbing noise: tokens turn into the mask, id ``vocab``, and stay there.

    Attributes:
        vocab: number V of data tokens, ids 0 .. V-1.
        schedule: survival probability over t; log-linear with eps 1e-3 by default.
    """

    name = "masked"

    @property
    def states(self) -> int:
        """V + 1: the tokens and the mask."""
        return self.vocab + 1

    @property
    def mask_id(self) -> int:
        """Id of the mask."""
        return self.vocab

    def prior(
        self, shape: tuple[int, ...], generator: torch.Generator | None = None, device: torch.device | None = None
    ) -> Tensor:
        """All masks."""
        return torch.full(shape, self.vocab, dtype=torch.int64, device=device)

    def forward_matrix(self, s: Time, t: Time) -> Tensor:
        """Forward transition probabilities (S, S) from time s to t >= s; row = from."""
        keep = self.alpha(t) / self.alpha(s)
        matrix = keep * torch.eye(self.states, dtype=torch.float64)
        return matrix + (1.0 - keep) * torch.eye(self.states, dtype=torch.float64)[-1]

    def rate_matrix(self, t: Time) -> Tensor:
        """Forward generator (S, S): entry [a, b] is the rate of a -> b, rows sum to zero."""
        eye = torch.eye(self.states, dtype=torch.float64)
        return self.schedule.rate(t) * (eye[-1] - eye)

    def settle(self, probs: Tensor, x: Tensor) -> Tensor:
        """The posterior with revealed sites put on their own token, as absorbing noise implies."""
        known = (x != self.vocab)[..., None]
        return torch.where(known, one_hot(x, self.vocab, probs), probs)

    def retime(self, probs: Tensor, x: Tensor, t: Time, s: Time) -> Tensor:
        """The posterior that what is known of the other sites at t would give at s: under masked noise the same."""
        return probs

    def reverse_rates(self, probs: Tensor, x: Tensor, t: Time) -> Tensor:
        """Reverse jump rates (B, L, S) of the posterior ``probs`` (B, L, V); zero at revealed sites."""
        alpha = self.alpha(t)
        hidden = (x == self.vocab)[..., None]
        rates = torch.where(hidden, _rows(self.schedule.rate(t) * alpha / (1.0 - alpha), probs) * probs, 0.0)
        return torch.cat([rates, torch.zeros_like(rates[..., :1])], dim=-1)

    def unmask_probability(self, t: Time, s: Time) -> Tensor:
        """Chance that a site masked at t is revealed by s < t."""
        return (self.alpha(s) - self.alpha(t)) / (1.0 - self.alpha(t))

    def reveal(self, probs: Tensor, x: Tensor, chance: float | Tensor) -> Tensor:
        """Kernel (B, L, S) that reveals each masked site with probability ``chance`` by a draw from ``probs``."""
        chance = _rows(torch.as_tensor(chance, dtype=probs.dtype if not torch.is_tensor(chance) else None), probs)
        hidden = (x == self.vocab)[..., None]
        tokens = torch.where(hidden, chance * probs, one_hot(x, self.vocab, probs))
        rest = torch.where(hidden, 1.0 - chance, 0.0)
        return torch.cat([tokens, rest.to(tokens.dtype).expand_as(tokens[..., :1])], dim=-1)

    def bridge(self, probs: Tensor, x: Tensor, t: Time, s: Time) -> Tensor:
        """Exact one-site reverse kernel (B, L, S) from t to s < t ("Tweedie", ancestral)."""
        return self.reveal(probs, x, self.unmask_probability(t, s))

    def finish(self, probs: Tensor, x: Tensor) -> Tensor:
        """Kernel of the last step: every masked site takes a draw from its posterior."""
        return self.reveal(probs, x, 1.0)

    def score(self, probs: Tensor, x: Tensor, t: Time) -> Tensor:
        """Concrete score (B, L, S) of a posterior: alpha / (1 - alpha) * D at masked sites, one at x, zero elsewhere."""
        alpha = self.alpha(t)
        hidden = (x == self.vocab)[..., None]
        ratio = torch.where(hidden, _rows(alpha / (1.0 - alpha), probs) * probs, 0.0)
        ratio = torch.cat([ratio, torch.zeros_like(ratio[..., :1])], dim=-1)
        return ratio + one_hot(x, self.states, probs)

    def posterior_of_score(self, score: Tensor, x: Tensor, t: Time) -> Tensor:
        """Posterior (B, L, V) of a concrete score (B, L, S or V); masked rows are normalised, so t does not matter."""
        tokens = score[..., : self.vocab]
        return self.settle(tokens / tokens.sum(-1, keepdim=True).clamp(min=torch.finfo(tokens.dtype).tiny), x)


@dataclass(frozen=True)
class UniformProcess(_Process):
    """Uniform noise: tokens are redrawn uniformly over the vocabulary, so every site may change at any time.

    Attributes:
        vocab: number V of tokens.
        schedule: survival probability over t; log-linear with eps 1e-3 by default.
    """

    name = "uniform"

    @property
    def states(self) -> int:
        """V."""
        return self.vocab

    def prior(
        self, shape: tuple[int, ...], generator: torch.Generator | None = None, device: torch.device | None = None
    ) -> Tensor:
        """Independent uniform ids."""
        place = device if generator is None else generator.device
        return torch.randint(self.vocab, shape, generator=generator, device=place).to(device)

    def forward_matrix(self, s: Time, t: Time) -> Tensor:
        """Forward transition probabilities (S, S) from time s to t >= s; row = from."""
        keep = self.alpha(t) / self.alpha(s)
        return keep * torch.eye(self.vocab, dtype=torch.float64) + (1.0 - keep) / self.vocab

    def rate_matrix(self, t: Time) -> Tensor:
        """Forward generator (S, S): entry [a, b] is the rate of a -> b, rows sum to zero."""
        return self.schedule.rate(t) * (1.0 / self.vocab - torch.eye(self.vocab, dtype=torch.float64))

    def settle(self, probs: Tensor, x: Tensor) -> Tensor:
        """The posterior as it is: under uniform noise every site is open."""
        return probs

    def leave_one_out(self, probs: Tensor, x: Tensor, t: Time) -> Tensor:
        """Posterior (B, L, V) of each clean token given the *other* sites of x_t."""
        alpha = _rows(self.alpha(t), probs)
        other = (1.0 - alpha) / self.vocab
        weights = probs * torch.where(one_hot(x, self.vocab, probs) > 0, other / (alpha + other), 1.0)
        return weights / weights.sum(-1, keepdim=True)

    def retime(self, probs: Tensor, x: Tensor, t: Time, s: Time) -> Tensor:
        """The posterior (B, L, V) that what is known of the other sites at t would give at s."""
        alpha = _rows(self.alpha(s), probs)
        joint = self.leave_one_out(probs, x, t) * (alpha * one_hot(x, self.vocab, probs) + (1.0 - alpha) / self.vocab)
        return joint / joint.sum(-1, keepdim=True)

    def score(self, probs: Tensor, x: Tensor, t: Time) -> Tensor:
        """Concrete score (B, L, V) of a posterior; one at x."""
        alpha = _rows(self.alpha(t), probs)
        marginal = alpha * self.leave_one_out(probs, x, t) + (1.0 - alpha) / self.vocab
        return marginal / marginal.gather(-1, x[..., None])

    def posterior_of_score(self, score: Tensor, x: Tensor, t: Time) -> Tensor:
        """Posterior (B, L, V) of a concrete score (B, L, V); what no posterior can give (negative) becomes zero."""
        alpha = _rows(self.alpha(t), score)
        other = (1.0 - alpha) / self.vocab
        score = torch.where(one_hot(x, self.vocab, score) > 0, 1.0, score)
        marginal = score / score.sum(-1, keepdim=True)
        alone = ((marginal - other) / alpha).clamp(min=0.0)
        joint = alone * torch.where(one_hot(x, self.vocab, score) > 0, alpha + other, other)
        return joint / joint.sum(-1, keepdim=True)

    def reverse_rates(self, probs: Tensor, x: Tensor, t: Time) -> Tensor:
        """Reverse jump rates (B, L, V) of the posterior ``probs``; zero at x."""
        rates = _rows(self.schedule.rate(t) / self.vocab, probs) * self.score(probs, x, t)
        return torch.where(one_hot(x, self.vocab, probs) > 0, 0.0, rates)

    def bridge(self, probs: Tensor, x: Tensor, t: Time, s: Time) -> Tensor:
        """Exact one-site reverse kernel (B, L, V) from t to s < t ("Tweedie", ancestral)."""
        alpha_s = _rows(self.alpha(s), probs)
        keep = _rows(self.alpha(t) / self.alpha(s), probs)
        alone = self.leave_one_out(probs, x, t)
        marginal = alpha_s * alone + (1.0 - alpha_s) / self.vocab
        rows = marginal * (keep * one_hot(x, self.vocab, probs) + (1.0 - keep) / self.vocab)
        return rows / rows.sum(-1, keepdim=True)

    def finish(self, probs: Tensor, x: Tensor) -> Tensor:
        """Kernel of the last step: a draw from the posterior."""
        return probs


Process = MaskedProcess | UniformProcess


def process_from_dict(config: dict[str, Any]) -> Process:
    """The process of a `to_dict` form.

    Raises:
        ValueError: it names an unknown process.
    """
    kinds = {"masked": MaskedProcess, "uniform": UniformProcess}
    if config.get("process") not in kinds:
        raise ValueError(f"unknown process {config.get('process')!r}; known: {', '.join(kinds)}")
    return kinds[config["process"]](int(config["vocab"]), SurvivalSchedule(**config.get("schedule", {})))

"""Reward potentials: how a tilt exp(s r(x0)) is spread over the steps of a run (Singhal et al. 2025, arXiv:2501.06848)."""

from __future__ import annotations

import torch
from torch import Tensor

from .targets import Reward


class Steering:
    """Turns rewards seen on the way into log-weight increments that always sum to s r(result).

    Attributes:
        spent: (B,) log-potential applied so far.
        best: (B,) largest reward of the path ("max").
        total: (B,) sum of the path's rewards ("add").
    """

    def __init__(self, reward: Reward, batch: int, device: torch.device) -> None:
        """Start with nothing applied."""
        self.reward = reward
        self.spent = torch.zeros(batch, dtype=torch.float64, device=device)
        self.best = torch.full_like(self.spent, -torch.inf)
        self.total = torch.zeros_like(self.spent)

    def score(self, x0: Tensor) -> Tensor:
        """The rewards (B,) of x0-predictions (B, *E), in float64, on the weights' device.

        Raises:
            ValueError: the function returned another shape, naming it.
        """
        values = self.reward.fn(x0)
        if not torch.is_tensor(values):
            values = torch.as_tensor(values)
        if values.shape != (len(x0),):
            raise ValueError(f"the reward returned shape {tuple(values.shape)} for {len(x0)} samples; it must be ({len(x0)},)")
        return values.to(self.spent.device).to(torch.float64)

    def observe(self, values: Tensor, t: float) -> Tensor:
        """The increment (B,) for rewards (B,) seen at time t."""
        scale = self.reward.at(t)
        if self.reward.potential == "difference":
            increment = scale * values - self.spent
        elif self.reward.potential == "max":
            self.best = torch.maximum(self.best, values)
            increment = scale * self.best
        else:
            self.total = self.total + values
            increment = scale * self.total
        self.spent = self.spent + increment
        return increment

    def finish(self, values: Tensor, t: float) -> Tensor:
        """The last increment (B,), from the rewards (B,) of the result: what was applied becomes s r."""
        increment = self.reward.at(t) * values - self.spent
        self.spent = self.spent + increment
        return increment

    def select(self, index: Tensor) -> None:
        """Follow resampled particles: ``index`` (B,)."""
        self.spent, self.best, self.total = self.spent[index], self.best[index], self.total[index]

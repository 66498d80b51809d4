r"""Noise schedules of discrete diffusion: the survival probability $\alpha_t$ of a token and its hazard.

A token keeps its value until t with probability $\alpha_t = \exp(-\int_0^t \sigma)$. Time runs from 0 (data) to 1 (noise);
values are float64 and differentiable in t.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Time = float | Tensor

KINDS = ("loglinear", "geometric", "cosine")


def as_float64(value: Time) -> Tensor:
    """``value`` as a float64 tensor; gradients pass through."""
    return torch.as_tensor(value, dtype=torch.float64)


@dataclass(frozen=True)
class SurvivalSchedule:
    r"""One family of $\alpha_t$.

    Attributes:
        kind: "loglinear": $\alpha = 1 - (1-\epsilon) t$ (Lou et al. 2024, arXiv:2310.16834, sec. 5.1);
            "geometric": $-\log\alpha = \sigma_0^{1-t} \sigma_1^t$ (same); "cosine": $\alpha = 1 - (1-\epsilon) \sin(\pi t / 2)$
            (Chang et al. 2022, arXiv:2202.04200: the mask ratio $\cos(\pi r / 2)$ at progress $r = 1 - t$).
        eps: the $\epsilon$ of loglinear and cosine, in (0, 1).
        sigma_min: $\sigma_0$ of geometric.
        sigma_max: $\sigma_1$ of geometric.
    """

    kind: str = "loglinear"
    eps: float = 1e-3
    sigma_min: float = 1e-4
    sigma_max: float = 20.0

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.kind not in KINDS:
            raise ValueError(f"unknown survival schedule {self.kind!r}; known: {', '.join(KINDS)}")
        if not 0.0 < self.eps < 1.0:
            raise ValueError(f"eps must be in (0, 1), got {self.eps}")
        if not 0.0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"geometric needs 0 < sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}")

    def alpha(self, t: Time) -> Tensor:
        r"""$\alpha_t$."""
        t = as_float64(t)
        if self.kind == "loglinear":
            return 1.0 - (1.0 - self.eps) * t
        if self.kind == "cosine":
            return 1.0 - (1.0 - self.eps) * torch.sin(0.5 * math.pi * t)
        return torch.exp(-self._total(t))

    def rate(self, t: Time) -> Tensor:
        r"""The hazard $\sigma(t) = -\alpha'_t / \alpha_t$."""
        t = as_float64(t)
        if self.kind == "loglinear":
            return (1.0 - self.eps) / self.alpha(t)
        if self.kind == "cosine":
            return (1.0 - self.eps) * 0.5 * math.pi * torch.cos(0.5 * math.pi * t) / self.alpha(t)
        return self._total(t) * math.log(self.sigma_max / self.sigma_min)

    def t_of_alpha(self, alpha: Time) -> Tensor:
        """The inverse of `alpha`."""
        alpha = as_float64(alpha)
        if self.kind == "loglinear":
            return (1.0 - alpha) / (1.0 - self.eps)
        if self.kind == "cosine":
            return torch.asin(((1.0 - alpha) / (1.0 - self.eps)).clamp(0.0, 1.0)) / (0.5 * math.pi)
        return (torch.log(-torch.log(alpha)) - math.log(self.sigma_min)) / math.log(self.sigma_max / self.sigma_min)

    def to_dict(self) -> dict[str, Any]:
        """JSON form; `SurvivalSchedule(**d)` reads it back."""
        if self.kind == "geometric":
            return {"kind": self.kind, "sigma_min": self.sigma_min, "sigma_max": self.sigma_max}
        return {"kind": self.kind, "eps": self.eps}

    def _total(self, t: Tensor) -> Tensor:
        return self.sigma_min ** (1.0 - t) * self.sigma_max**t

r"""Noise schedules: $q(x_t | x_0) = N(\alpha_t x_0, \sigma_t^2 I)$, $\lambda = \log(\alpha / \sigma)$ and its inverse.

Time runs from 0 (data) to `NoiseSchedule.t_max` (noise); $\lambda$ strictly decreases in t. All values are float64
and differentiable in t. Each family states $\log\alpha$ and $\sigma$ in forms that keep full precision at both ends.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Times may leave their range by float32 rounding of published grids (80.0000076, 0.99999988): clamp, do not refuse.
ROUNDING = 1e-5
COSINE_OFFSET = 0.008  # s of Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 17

Time = float | Tensor


def as_float64(value: Time) -> Tensor:
    """``value`` as a float64 tensor; gradients pass through."""
    return torch.as_tensor(value, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    r"""A family of $(\alpha_t, \sigma_t)$ with its parameters; build one with the class methods.

    Attributes:
        kind: "vp_linear", "vp_cosine", "vp_trig", "vp_discrete", "edm" or "flow".
        t_max: the noisiest time.
        t_min: the cleanest time that named grids evaluate the network at or end on (not a bound: t = 0 is
            allowed, and means sigma = 0).
        parameters: the family's own numbers, JSON-native.
        table: vp_discrete only: $-\log\alpha$ at t = 0, 1/N, ..., 1, float64.
    """

    kind: str
    t_max: float
    t_min: float
    parameters: Mapping[str, Any]
    table: Tensor | None = field(default=None, repr=False)

    # ---- families ----------------------------------------------------------------------------------------------

    @classmethod
    def vp_linear(cls, beta_min: float = 0.1, beta_max: float = 20.0) -> NoiseSchedule:
        r"""Variance preserving, $\beta(t)$ linear on t in [0, 1] (Song et al. 2021, arXiv:2011.13456, eq. 32-33)."""
        if not 0 < beta_min <= beta_max:
            raise ValueError(f"vp_linear needs 0 < beta_min <= beta_max, got {beta_min} and {beta_max}")
        return cls("vp_linear", 1.0, 1e-3, {"beta_min": float(beta_min), "beta_max": float(beta_max)})

    @classmethod
    def vp_cosine(cls) -> NoiseSchedule:
        r"""Variance preserving, $\bar\alpha$ a squared cosine on t in [0, 1]; $\alpha = 0$ at t = 1 (arXiv:2102.09672)."""
        return cls("vp_cosine", 1.0, 1e-3, {})

    @classmethod
    def vp_trig(cls) -> NoiseSchedule:
        r"""Variance preserving, $\alpha = \cos(\pi t/2)$, $\sigma = \sin(\pi t/2)$ (arXiv:2202.00512, appendix D)."""
        return cls("vp_trig", 1.0, 1e-3, {})

    @classmethod
    def vp_discrete(cls, alphas_cumprod: Tensor, *, exact_end: bool = False) -> NoiseSchedule:
        r"""Variance preserving, given at N training steps; step n (0-based) is t = (n + 1) / N.

        $\log\alpha$ is linear in t between the steps and from the first of them to 0 at t = 0.

        Args:
            alphas_cumprod: (N,) strictly decreasing in (0, 1); a last entry of exactly 0 (zero terminal signal-to-noise
                ratio) is read as $2^{-24}$, as diffusers' higher-order schedulers do.
            exact_end: at t = 1 such a schedule has alpha = 0 after all, as diffusers' first-order schedulers do.
        """
        table = as_float64(alphas_cumprod).detach().cpu().clone()
        if table.ndim != 1 or len(table) < 1:
            raise ValueError(f"alphas_cumprod must have shape (N,), got {tuple(table.shape)}")
        parameters: dict[str, Any] = {"num_train_timesteps": len(table)}
        if table[-1] in (0.0, 2.0**-24):
            parameters |= {"exact_end": True} if exact_end else {}
            # Rescaled linear betas come below that value before the end, where no grid can use them: keep the order.
            end = 2.0**-24 * (1 + 1e-6 * torch.arange(len(table) - 1, -1, -1, dtype=torch.float64))
            table = torch.maximum(table, end)
        padded = torch.cat([torch.ones(1, dtype=torch.float64), table])
        if not bool((padded.diff() < 0).all() and (table > 0).all()):
            raise ValueError("alphas_cumprod must lie in (0, 1) and decrease strictly")
        return cls("vp_discrete", 1.0, 1.0 / len(table), parameters, -0.5 * padded.log())

    @classmethod
    def edm(cls, sigma_min: float = 0.002, sigma_max: float = 80.0, *, clock: str = "log") -> NoiseSchedule:
        r"""Variance exploding in the frame of Karras et al. 2022 (arXiv:2206.00364): $\alpha = 1$, $\sigma = t$.

        ``clock`` says what the network is told: "log" ($\log(\sigma)/4$) or "atan" ($\arctan(\sigma)\,2/\pi$, Stable Audio).
        """
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"edm needs 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
        if clock not in ("log", "atan"):
            raise ValueError(f"unknown clock {clock!r}; known: log, atan")
        parameters = {"sigma_min": float(sigma_min), "sigma_max": float(sigma_max), "clock": clock}
        return cls("edm", float(sigma_max), float(sigma_min), parameters)

    @classmethod
    def flow(cls, shift: float = 1.0, *, inverted: bool = False) -> NoiseSchedule:
        r"""Rectified flow: $\alpha = 1 - t$, $\sigma = t$ on [0, 1] (Liu et al. 2022, arXiv:2209.03003).

        ``shift`` moves named time grids, $t \mapsto s t / (1 + (s - 1) t)$ (Esser et al. 2024, arXiv:2403.03206, eq. 23);
        it does not change $\alpha$ or $\sigma$. ``inverted``: the network is told $1000 (1 - t)$ (Mochi).
        """
        if not shift > 0:
            raise ValueError(f"flow needs shift > 0, got {shift}")
        return cls("flow", 1.0, 1e-3, {"shift": float(shift)} | ({"inverted": True} if inverted else {}))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """The noise schedule that a diffusers scheduler's config describes.

        Args:
            config: ``scheduler.config`` or the content of ``scheduler_config.json``; a missing ``_class_name`` is inferred
                from the keys.

        Raises:
            ValueError: the config belongs to no supported family; the message names it.
        """
        from .config_reader import read_config

        return read_config(config).noise_schedule()

    # ---- values ------------------------------------------------------------------------------------------------

    @property
    def family(self) -> str:
        """What decides how alpha and sigma are tied: "vp", "edm" or "flow"."""
        return self.kind.split("_")[0]

    @property
    def _betas(self) -> tuple[float, float]:
        return float(self.parameters["beta_min"]), float(self.parameters["beta_max"])

    @property
    def _training_steps(self) -> int:
        return int(self.parameters.get("num_train_timesteps", 1000))

    def clamp(self, t: Time) -> Tensor:
        """``t`` as float64 within [0, t_max].

        Raises:
            ValueError: a time lies outside by more than float32 rounding, or is not a number.
        """
        t = as_float64(t)
        values = t.detach()
        inside = (values >= -ROUNDING * self.t_min) & (values <= self.t_max * (1 + ROUNDING))
        if not bool(inside.all()):
            wrong = values[~inside].flatten()[0].item()
            raise ValueError(f"time {wrong:.8g} is outside [0, {self.t_max:g}] of the {self.kind} noise schedule")
        return t.clamp(0.0, self.t_max)

    def _neg_log_alpha(self, t: Tensor) -> Tensor:
        r"""$-\log\alpha$ of the VP families, >= 0; exact near t = 0."""
        if self.kind == "vp_linear":
            low, high = self._betas
            return t * t * ((high - low) / 4) + t * (low / 2)
        assert self.table is not None
        table = self.table.to(t.device)
        n = len(table) - 1
        position = t * n
        left = position.detach().floor().long().clamp(0, n - 1)
        return table[left] + (position - left) * (table[left + 1] - table[left])

    def alpha_sigma(self, t: Time) -> tuple[Tensor, Tensor]:
        r"""$(\alpha_t, \sigma_t)$, float64, in the shape of ``t``."""
        t = self.clamp(t)
        if self.kind == "edm":
            return torch.ones_like(t), t
        if self.kind == "flow":
            return 1.0 - t, t
        if self.kind == "vp_cosine":
            start, step = _cosine_angles(t)
            # sin of the complement keeps alpha exact near t = 1; cos^2 A - cos^2 B = sin(B - A) sin(B + A) near t = 0.
            alpha = torch.sin((1.0 - t) / (1 + COSINE_OFFSET) * (math.pi / 2)) / math.cos(start)
            return alpha, (torch.sin(step) * torch.sin(2 * start + step)).clamp(min=0).sqrt() / math.cos(start)
        if self.kind == "vp_trig":  # sin of the complement: exactly 0 at t = 1
            return torch.sin((1.0 - t) * (math.pi / 2)), torch.sin(t * (math.pi / 2))
        loss = self._neg_log_alpha(t)
        if self.parameters.get("exact_end"):
            loss = torch.where(t == self.t_max, math.inf, loss)
        return torch.exp(-loss), torch.sqrt(-torch.expm1(-2 * loss))

    def alpha(self, t: Time) -> Tensor:
        r"""$\alpha_t$, float64."""
        return self.alpha_sigma(t)[0]

    def sigma(self, t: Time) -> Tensor:
        r"""$\sigma_t$, float64."""
        return self.alpha_sigma(t)[1]

    def lam(self, t: Time) -> Tensor:
        r"""$\lambda_t = \log(\alpha_t / \sigma_t)$, float64; $+\infty$ at $\sigma = 0$, $-\infty$ at $\alpha = 0$."""
        alpha, sigma = self.alpha_sigma(t)
        return torch.log(alpha) - torch.log(sigma)

    def t_of_lam(self, lam: Time) -> Tensor:
        r"""The time with the given $\lambda$: the inverse of `lam`, float64, within [0, t_max]."""
        lam = as_float64(lam)
        if self.kind == "edm":
            return torch.exp(-lam).clamp(max=self.t_max)
        if self.kind == "flow":
            return torch.sigmoid(-lam)
        if self.kind == "vp_cosine":
            start = _cosine_angles(torch.zeros(()))[0]
            c, s = math.cos(start), math.sin(start)
            sine = torch.sqrt(s * s + c * c * torch.sigmoid(-2 * lam))
            angle = torch.atan2(sine, c * torch.sigmoid(2 * lam).sqrt())
            return ((angle - start) * ((1 + COSINE_OFFSET) * 2 / math.pi)).clamp(0.0, 1.0)
        if self.kind == "vp_trig":
            return torch.atan(torch.exp(-lam)) * (2 / math.pi)
        loss = 0.5 * F.softplus(-2 * lam)  # -log alpha
        if self.kind == "vp_linear":
            low, high = self._betas
            b = low / 2
            return (2 * loss / (b + torch.sqrt(b * b + (high - low) * loss))).clamp(max=1.0)
        assert self.table is not None
        table = self.table.to(lam.device)
        n = len(table) - 1
        left = (torch.searchsorted(table, loss.detach().contiguous(), right=True) - 1).clamp(0, n - 1)
        fraction = (loss - table[left]) / (table[left + 1] - table[left])
        return ((left + fraction) / n).clamp(max=1.0)

    # ---- the network's own clock ---------------------------------------------------------------------------------

    def timestep(self, t: Time) -> Tensor:
        r"""What diffusers networks are given as ``timestep`` at time t, float64.

        VP: $t N - 1$ (N = 1000 for the continuous families), but t itself for "vp_trig"; flow: $1000 t$, or $1000 (1 - t)$ for
        models whose time is inverted; EDM: as its clock says.
        """
        t = self.clamp(t)
        if self.kind == "edm":
            return 0.25 * torch.log(t) if self.parameters["clock"] == "log" else torch.atan(t) * (2 / math.pi)
        if self.kind == "flow":
            return 1000.0 * (1.0 - t if self.parameters.get("inverted") else t)
        return t if self.kind == "vp_trig" else t * self._training_steps - 1.0

    def t_of_timestep(self, timestep: Time) -> Tensor:
        """The inverse of `timestep`, float64."""
        timestep = as_float64(timestep)
        if self.kind == "edm":
            log = self.parameters["clock"] == "log"
            return torch.exp(4.0 * timestep) if log else torch.tan(timestep * (math.pi / 2))
        if self.kind == "flow":
            return 1.0 - timestep / 1000.0 if self.parameters.get("inverted") else timestep / 1000.0
        return timestep if self.kind == "vp_trig" else (timestep + 1.0) / self._training_steps


def _cosine_angles(t: Tensor) -> tuple[float, Tensor]:
    """The cosine schedule's angle at t = 0, and how far ``t`` has moved from it."""
    unit = math.pi / 2 / (1 + COSINE_OFFSET)
    return COSINE_OFFSET * unit, t * unit

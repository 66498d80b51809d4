"""A weighted population and its history: what every run, native or in a pipeline, keeps of its particles."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .resampling import Generators, draw_one, resample
from .weights import conditional_ess, ess, log_mean_exp, normalise, tempered

PICKS = ("all", "sample", "max")


@dataclass(frozen=True)
class Rules:
    """How weights are treated.

    Attributes:
        scheme: resampling scheme.
        threshold: resample a group when its ESS falls below this share of K; 0 never, 1 whenever weights differ.
        clip: bound on a step's centred log-weight increments, or None.
        temper: share of K that one step must leave of the ESS, or None.
    """

    scheme: str = "systematic"
    threshold: float = 0.5
    clip: float | None = None
    temper: float | None = None


@dataclass
class Trace:
    """What happened at each step; lists of tensors with one entry per step, P groups of K particles.

    Attributes:
        ess: (P,) effective sample size before resampling.
        conditional_ess: (P,) of the step's increment alone.
        largest: (P,) largest normalised weight before resampling.
        resampled: (P,) bool.
        ancestors: (P, K) index of the particle each one continues.
        log_z: (P,) running estimate.
        kappa: (P,) share of the increment that tempering let through; 1 without it.
        clipped: (P,) share of increments that the clamp changed; 0 without it.
    """

    ess: list[Tensor] = field(default_factory=list)
    conditional_ess: list[Tensor] = field(default_factory=list)
    largest: list[Tensor] = field(default_factory=list)
    resampled: list[Tensor] = field(default_factory=list)
    ancestors: list[Tensor] = field(default_factory=list)
    log_z: list[Tensor] = field(default_factory=list)
    kappa: list[Tensor] = field(default_factory=list)
    clipped: list[Tensor] = field(default_factory=list)

    def roots(self) -> Tensor:
        """(steps, P, K): which starting particle each particle descends from, after every step."""
        roots, out = None, []
        for ancestors in self.ancestors:
            roots = ancestors if roots is None else roots.gather(-1, ancestors)
            out.append(roots)
        return torch.stack(out)

    def surviving(self) -> Tensor:
        """(steps, P): how many starting particles still have descendants."""
        ordered = self.roots().sort(-1).values
        return 1 + (ordered.diff(dim=-1) != 0).sum(-1)

    def applied(self) -> float:
        """Mean share of the log-weights that was applied: 1 unless tempered."""
        return float(torch.stack(self.kappa).mean()) if self.kappa else 1.0

    def clipped_share(self) -> float:
        """Mean share of increments that the clamp changed: 0 unless clipped."""
        return float(torch.stack(self.clipped).mean()) if self.clipped else 0.0


class Population:
    """Running log-weights of P groups of K particles; particle k of group p is row p K + k of every batch."""

    def __init__(self, groups: int, particles: int, rules: Rules, device: torch.device, generator: Generators) -> None:
        """Start with equal weights; ``generator`` is the source of resampling's draws, or a list with one for each group."""
        self.rules, self.generator = rules, generator
        # MPS has no float64; the weights are few, so they live on the CPU there.
        self.device = torch.device("cpu") if device.type == "mps" else device
        self.log_w = torch.zeros(groups, particles, dtype=torch.float64, device=self.device)
        self.log_z = torch.zeros(groups, dtype=torch.float64, device=self.device)
        self.trace = Trace()
        self._before = self.log_w
        self._kappa = torch.ones_like(self.log_z)
        self._clipped = torch.zeros_like(self.log_z)

    @property
    def shape(self) -> tuple[int, int]:
        """Groups and particles."""
        return self.log_w.shape[0], self.log_w.shape[1]

    def add(self, increment: Tensor) -> None:
        """Multiply the weights: ``increment`` (P K,) of their logarithms."""
        increment = increment.to(self.device, torch.float64).reshape(self.shape)
        if self.rules.clip is not None:
            mean = increment.mean(-1, keepdim=True)
            clamped = mean + (increment - mean).clamp(-self.rules.clip, self.rules.clip)
            self._clipped = torch.maximum(self._clipped, (clamped != increment).double().mean(-1))
            increment = clamped
        if self.rules.temper is not None:
            increment, kappa = tempered(self.log_w, increment, self.rules.temper)
            self._kappa = torch.minimum(self._kappa, kappa)
        self.log_w = self.log_w + increment

    def select(self, *, allowed: bool) -> Tensor | None:
        """End a step: record it, and resample the groups that need it.

        No host-device synchronisation: every group gets an index, the identity where it was not resampled.

        Args:
            allowed: whether resampling may happen here at all.

        Returns:
            Rows (P K,) to continue with, or None where nothing may change.
        """
        trace, (groups, k) = self.trace, self.shape
        size = ess(self.log_w)
        trace.ess.append(size)
        trace.largest.append(normalise(self.log_w).amax(-1))
        trace.conditional_ess.append(conditional_ess(self._before, self.log_w - self._before))
        trace.kappa.append(self._kappa)
        trace.clipped.append(self._clipped)
        trace.log_z.append(self.log_z + log_mean_exp(self.log_w))
        self._kappa, self._clipped = torch.ones_like(self._kappa), torch.zeros_like(self._clipped)
        identity = torch.arange(k, device=self.device).expand(groups, k)
        if not allowed or self.rules.threshold == 0.0 or k == 1:
            trace.resampled.append(torch.zeros(groups, dtype=torch.bool, device=self.device))
            trace.ancestors.append(identity)
            self._before = self.log_w
            return None
        due = size < self.rules.threshold * k * (1 - 1e-9)
        ancestors = torch.where(due[:, None], resample(self.log_w, self.rules.scheme, self.generator), identity)
        self.log_z = torch.where(due, self.log_z + log_mean_exp(self.log_w), self.log_z)
        self.log_w = torch.where(due[:, None], torch.zeros_like(self.log_w), self.log_w)
        self._before = self.log_w
        trace.resampled.append(due)
        trace.ancestors.append(ancestors)
        return (ancestors + k * torch.arange(groups, device=self.device)[:, None]).reshape(-1)

    def total_log_z(self) -> Tensor:
        """(P,) the estimate with the present weights folded in.

        A group that lost all its weight has minus infinity, and a warning.
        """
        total = self.log_z + log_mean_exp(self.log_w)
        if bool((total == -math.inf).any()):
            warnings.warn("all particles of a group have zero weight: its images are as good as unweighted", stacklevel=2)
        return total

    def pick(self, how: str, generator: Generators = None) -> Tensor:
        """Rows to keep: "all" of them (P K,), or one per group (P,) drawn by weight ("sample") or the heaviest ("max").

        Raises:
            ValueError: unknown ``how``.
        """
        check_pick(how)
        groups, k = self.shape
        rows = torch.arange(groups * k, device=self.device).reshape(groups, k)
        if how == "all":
            return rows.reshape(-1)
        w = normalise(self.log_w)
        chosen = w.argmax(-1, keepdim=True) if how == "max" else draw_one(w, generator)
        return rows.gather(-1, chosen).reshape(-1)


def check_pick(how: str) -> str:
    """``how`` itself.

    Raises:
        ValueError: it is not one of `PICKS`.
    """
    if how not in PICKS:
        raise ValueError(f"unknown pick {how!r}; known: {', '.join(PICKS)}")
    return how


@dataclass(frozen=True)
class Cloud:
    """Weighted particles at the end of a run; with groups, every tensor has a leading axis of P groups (steps stay first).

    Attributes:
        x: (K, *E) the particles at the last time.
        log_w: (K,) log-weights since the last resampling.
        log_z: log of the integral of the target's unnormalised density over x, present weights included.
        ess: (steps,) effective sample size before resampling.
        ancestors: (steps, K) the particle each one continues.
        trace: everything recorded, with the group axis always there.
        nfe: network evaluations per particle, all branches together.
    """

    x: Tensor
    log_w: Tensor
    log_z: Tensor
    ess: Tensor
    ancestors: Tensor
    trace: Trace
    nfe: int

    @property
    def w(self) -> Tensor:
        """(K,) normalised weights."""
        return normalise(self.log_w)

    def pick(self, how: str = "sample", generator: torch.Generator | None = None) -> Tensor:
        """One particle (*E) drawn by weight ("sample") or the heaviest ("max"), one per group if there are groups; or "all".

        Raises:
            ValueError: unknown ``how``.
        """
        check_pick(how)
        if how == "all":
            return self.x
        grouped = self.log_w.ndim == 2
        w, x = (self.w, self.x) if grouped else (self.w[None], self.x[None])
        chosen = w.argmax(-1) if how == "max" else draw_one(w, generator)[:, 0]
        picked = x[torch.arange(len(x)), chosen.to(x.device)]
        return picked if grouped else picked[0]

    def resampled(self, generator: torch.Generator | None = None, scheme: str = "systematic") -> Tensor:
        """(K, *E) equally weighted particles."""
        index = resample(self.log_w, scheme, generator).to(self.x.device)
        if index.ndim == 1:
            return self.x[index]
        return self.x[torch.arange(len(index))[:, None], index]

"""Which of two schedules is better, before either is run: a small recurrent ranking network and an ensemble of it.

The recipe is that of the S3 paper's line of work (arXiv:2312.07243; the step encoder, the pooled LSTM and the pairwise loss are
OMS-DPM's, arXiv:2306.08860), made smaller: a search has hundreds of trials, not thousands. One network serves every NFE. New
is that it is also told each schedule's errors on problems with known answers (`search.known_problems`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import kendalltau
from torch import Tensor, nn

from samplers import NoiseSchedule, SolverSchedule, StepStrategy

from .known_problems import KnownProblems

FREQUENCIES = 8
_ORDERS, _AXES, _SOURCES = (1, 2, 3, 4), ("lambda", "sigma", "t", "index"), ("model", "zero_x0", "average_x0")
_RELAX_NAMES = (None, "bh1", "bh2", "half")
CATEGORIES = (4, 4, 3, 4, 6, 3, 4)  # order, axis, source, low-order nodes, corrector order, start, named relaxation
NUMBERS = 8  # place, gap, l, r, two relaxations, evaluation shift, amount of noise
_PAIRS = {"x0": (1.0, 0.0), "eps": (0.0, -1.0), "flow": (0.5, -0.5)}


@dataclass(frozen=True)
class Encoded:
    """Schedules as arrays, padded to the longest.

    Attributes:
        numbers: (N, L, NUMBERS) float32.
        categories: (N, L, len(CATEGORIES)) int64.
        mask: (N, L) float32, 1 where there is a step.
        known: (N, K) float32 log errors on `KnownProblems`.
    """

    numbers: Tensor
    categories: Tensor
    mask: Tensor
    known: Tensor

    def __getitem__(self, index: Tensor) -> Encoded:
        """Some of the schedules."""
        return Encoded(self.numbers[index], self.categories[index], self.mask[index], self.known[index])

    def __len__(self) -> int:
        """Number of schedules."""
        return len(self.mask)


class Encoder:
    """Turns schedules of one noise schedule into arrays."""

    def __init__(self, noise_schedule: NoiseSchedule, final_time: float = 0.0) -> None:
        """Remember the range of lambda, and solve the known problems."""
        self.noise, self.known = noise_schedule, KnownProblems(noise_schedule, final_time)
        self.low = max(float(noise_schedule.lam(noise_schedule.t_max)), -6.0)
        self.high = float(noise_schedule.lam(noise_schedule.t_min))

    def __call__(self, schedules: Sequence[SolverSchedule]) -> Encoded:
        """Encode them all; times are converted in one call."""
        length = max(len(schedule.steps) for schedule in schedules)
        numbers = np.zeros((len(schedules), length, NUMBERS), dtype=np.float32)
        categories = np.zeros((len(schedules), length, len(CATEGORIES)), dtype=np.int64)
        mask = np.zeros((len(schedules), length), dtype=np.float32)
        times = torch.tensor([t for schedule in schedules for t in schedule.times[:-1]], dtype=torch.float64)
        place = ((self.noise.lam(times).numpy() - self.low) / (self.high - self.low)).clip(0.0, 1.2)
        at = 0
        for n, schedule in enumerate(schedules):
            count = len(schedule.steps)
            own = place[at : at + count]
            at += count
            mask[n, :count] = 1.0
            numbers[n, :count, 0] = own
            numbers[n, :count, 1] = np.diff(np.append(own, 1.0))
            for i, step in enumerate(schedule.steps):
                numbers[n, i, 2:], categories[n, i] = _genes(step)
        known = torch.from_numpy(self.known(schedules)).float()
        return Encoded(torch.from_numpy(numbers), torch.from_numpy(categories), torch.from_numpy(mask), known)


def _genes(step: StepStrategy) -> tuple[list[float], list[int]]:
    l, r = step.pred if isinstance(step.pred, tuple) else _PAIRS[step.pred]
    relax = [*step.relax, None, None]
    free = [value if isinstance(value, float) else 0.0 for value in relax[:2]]
    named = relax[0] if isinstance(relax[0], str) else None
    low = step.d_nodes[0] if step.d_nodes and isinstance(step.d_nodes[0], int) else 0
    amount = 0.0 if step.noise is None else step.noise.amount
    return [l, r, *free, 10 * (step.eval.t_scale - 1.0), amount], [
        _ORDERS.index(step.order),
        _AXES.index(step.axis),
        _SOURCES.index(step.eval.source) if step.eval.source in _SOURCES else 0,
        min(low, 3),
        0 if step.corr is None else step.corr.order,
        min(-step.start, 3) - 1,
        _RELAX_NAMES.index(named) if named in _RELAX_NAMES else 0,
    ]


class RankingEnsemble(nn.Module):
    """Step embeddings -> LSTM -> normalised mean -> score, for all members in one pass; lower is better."""

    def __init__(self, members: int, width: int = 32, hidden: int = 48) -> None:
        """Build with small random weights from torch's current generator."""
        super().__init__()
        inputs = NUMBERS + 2 * FREQUENCIES + 8 * len(CATEGORIES)
        self.members, self.hidden = members, hidden
        self.tables = nn.ParameterList(nn.Parameter(torch.randn(members, count, 8)) for count in CATEGORIES)
        self.step = nn.ModuleList([_Linear(members, inputs, width), _Linear(members, width, width)])
        self.input, self.recurrent = _Linear(members, width, 4 * hidden), _Linear(members, hidden, 4 * hidden)
        known = KnownProblems.count
        self.head = nn.ModuleList(
            [_Linear(members, hidden + known, hidden), _Linear(members, hidden, hidden), _Linear(members, hidden, 1)]
        )
        # With few trials a weighted sum of the known problems' errors is the best guess. With many it keeps a search where
        # these problems want it, so every other member does without.
        self.prior = nn.Parameter(torch.full((members, known, 1), 1.0 / known))
        self.register_buffer("told", (torch.arange(members) % 2 == 0).float()[:, None, None])
        self.register_buffer("centre", torch.zeros(known))
        self.register_buffer("spread", torch.ones(known))
        self.register_buffer("frequencies", math.pi * 2.0 ** torch.arange(FREQUENCIES) / 4)

    def forward(self, batch: Encoded) -> Tensor:
        """Scores (members, N)."""
        n, length = batch.mask.shape
        angles = batch.numbers[..., :1] * self.frequencies
        shared = torch.cat([batch.numbers, angles.sin(), angles.cos()], dim=-1).flatten(0, 1).expand(self.members, -1, -1)
        embedded = [table[:, batch.categories[..., k].flatten()] for k, table in enumerate(self.tables)]
        x = torch.cat([shared, *embedded], dim=-1)
        for layer in self.step:
            x = nn.functional.silu(layer(x))
        gates = self.input(x).view(self.members, n, length, 4 * self.hidden)
        h = c = gates.new_zeros(self.members, n, self.hidden)
        total = torch.zeros_like(h)
        for i in range(length):
            into, keep, out, new = (gates[:, :, i] + self.recurrent(h)).chunk(4, dim=-1)
            c = keep.sigmoid() * c + into.sigmoid() * new.tanh()
            h = out.sigmoid() * c.tanh()
            total = total + nn.functional.normalize(h, dim=-1) * batch.mask[:, i, None]
        x = nn.functional.normalize(total / batch.mask.sum(1)[:, None], dim=-1)
        known = self.told * ((batch.known - self.centre) / self.spread)
        x = torch.cat([x, known], dim=-1)
        for layer in self.head[:-1]:
            x = layer(x).relu()
        return (self.head[-1](x) + known @ self.prior).squeeze(-1)


class _Linear(nn.Module):
    """One linear layer a member."""

    def __init__(self, members: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = inputs**-0.5
        self.weight = nn.Parameter(torch.empty(members, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(members, 1, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class Predictor:
    """An ensemble of ranking networks; every member is trained on another four fifths of the trials.

    Attributes:
        tau: Kendall's rank correlation on the trials that a member was not trained on, averaged over the members; None
            before `fit`.
    """

    def __init__(self, noise_schedule: NoiseSchedule, *, final_time: float = 0.0, members: int = 4, seed: int = 0) -> None:
        """Untrained networks.

        Args:
            noise_schedule: of the schedules to rank.
            final_time: where they end.
            members: networks.
            seed: of the weights, the splits and the pairs.
        """
        self.encode, self.seed, self.members = Encoder(noise_schedule, final_time), seed, members
        self.rng = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = RankingEnsemble(members)
        self.optimiser = torch.optim.AdamW(self.network.parameters(), lr=4e-3, weight_decay=1e-3)
        self.tau: float | None = None
        self.fitted = False

    def fit(self, schedules: Sequence[SolverSchedule], values: Sequence[float], *, epochs: int = 80) -> float:
        """Train on (schedule, value) pairs; a second call goes on from the weights of the first.

        Trials keep the member that leaves them out as more trials follow, so `tau` is of truly unseen ones.

        Args:
            schedules: at least 5 of them.
            values: lower is better.
            epochs: passes over freshly drawn pairs.

        Returns:
            Kendall's tau on the held-out trials; NaN when there are too few.
        """
        if len(schedules) < 5 or len(schedules) != len(values):
            raise ValueError(f"the predictor needs at least 5 trials and a value for each, got {len(schedules)}, {len(values)}")
        target = torch.tensor(np.log(np.clip(np.asarray(values, dtype=float), 1e-12, 1e3)), dtype=torch.float32)
        data = self.encode(schedules)
        fold = torch.tensor([int(schedule.digest[:8], 16) % 5 for schedule in schedules])
        held = torch.stack([fold == member % 5 for member in range(self.members)])
        good = (target <= target.median()).float()
        n = len(data)
        if not self.fitted:
            self.network.centre.copy_(data.known.mean(0))
            self.network.spread.copy_(data.known.std(0).clamp(min=0.05))
        self.network.train()
        with torch.enable_grad():
            for _ in range(epochs):
                scores = self.network(data)
                i, j = (torch.randint(n, (8 * n,), generator=self.rng) for _ in range(2))
                gap = target[i] - target[j]
                # Pairwise hinge with margin 1; pairs among the better half count double, for that is where proposals come from.
                weight = (gap.abs() > 0.01).float() * (1.0 + good[i] * good[j]) * (~held[:, i] & ~held[:, j])
                loss = (weight * torch.relu(1.0 - gap.sign() * (scores[:, i] - scores[:, j]))).sum() / weight.sum().clamp(
                    min=1.0
                )
                self.optimiser.zero_grad(set_to_none=True)
                (self.members * loss).backward()
                nn.utils.clip_grad_norm_(self.network.parameters(), 1.0 * self.members)
                self.optimiser.step()
        self.network.eval()
        raw = self._raw(data)
        taus = [_tau(raw[m][held[m]], target[held[m]]) for m in range(self.members) if int(held[m].sum()) >= 4]
        self.tau = float(np.nanmean(taus)) if taus and not np.isnan(taus).all() else None
        self.fitted = True
        return float("nan") if self.tau is None else self.tau

    def scores(self, schedules: Sequence[SolverSchedule]) -> np.ndarray:
        """(members, N) predicted ranks, standardised per member; lower is better."""
        raw = self._raw(self.encode(schedules))
        return ((raw - raw.mean(1, keepdim=True)) / raw.std(1, keepdim=True).clamp(min=1e-6)).numpy()

    def _raw(self, data: Encoded) -> Tensor:
        with torch.no_grad():
            return self.network(data)


def _tau(scores: Tensor, target: Tensor) -> float:
    return float(kendalltau(scores.numpy(), target.numpy()).statistic)

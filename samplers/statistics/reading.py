r"""What a v3 step needs from the statistics: integrals from its start s, all relative to s so that nothing overflows.

With $L = \int l$, $S = \int s$ from s on and $\beta = \int e^{-S} b$ (arXiv:2310.13268, eq. 8 to 11; the sampling ODE in
$f_j = ((1 - l_j) x_j) / \alpha_j - D_j$, D the x0-prediction):

    g_j = e^{-S_j} f_j - beta_j
    x_t = alpha_t e^{-L_t} [x_s / alpha_s - sum_k E_k g^{(k)} - C],  E_k = integral of e^{L+S} (lambda - lambda_s)^k / k!,
    C = integral of e^{L+S} beta
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..noise import as_float64
from ..parametrization import Scalar
from ..phi import gauss_legendre
from ..step import MAX_ORDER, STATISTICAL
from .empirical import EmpiricalStatistics

POINTS = 6  # of Gauss-Legendre per cell
WIDEST = 0.5  # cell in lambda: the integrals are then exact to rounding


@dataclass(frozen=True)
class Node:
    r"""A node seen from the start of a step: $l_j$, $e^{-S_j}$ and $\beta_j$, each of shape E."""

    l: Tensor
    decay: Tensor
    beta: Tensor


@dataclass(frozen=True)
class Integrals:
    r"""A step seen from its start: $e^{-L_t}$, $(E_0, E_1, \ldots)$ and $C$, each of shape E."""

    decay: Tensor
    moments: tuple[Tensor, ...]
    constant: Tensor


def check_range(statistics: EmpiricalStatistics, lam: float) -> None:
    """Refuse a lambda further than one node outside the statistics.

    Raises:
        ValueError: naming the value and the range.
    """
    low, high, width = statistics.lam[0].item(), statistics.lam[-1].item(), statistics.width
    if not low - width <= lam <= high + width:
        raise ValueError(f"lambda = {lam:.4g} is outside the statistics, which cover {low:.4g} to {high:.4g}")


class NodeReading:
    """As the published code reads them: every time counts as its nearest node, integrals are trapezoids over the nodes."""

    def __init__(self, statistics: EmpiricalStatistics) -> None:
        """Read ``statistics``."""
        self.statistics = statistics

    def node(self, lam: Tensor, start: Tensor) -> Node:
        """Node at ``lam`` for a step from ``start``."""
        i, j = self._index(start), self._index(lam)
        s = self._path(self.statistics.s, i, j)
        beta = self._trapezoids(torch.exp(-s) * self._slice(self.statistics.b, i, j), i, j)[-1]
        return Node(self.statistics.l[j].double(), torch.exp(-s[-1]), beta)

    def integrals(self, start: Tensor, end: Tensor, count: int) -> Integrals:
        """The step from ``start`` to ``end`` with ``count`` moments."""
        i, j = self._index(start), self._index(end)
        l, s = self._path(self.statistics.l, i, j), self._path(self.statistics.s, i, j)
        beta = self._trapezoids(torch.exp(-s) * self._slice(self.statistics.b, i, j), i, j)
        kernel = torch.exp(l + s)
        width = self._slice(self.statistics.lam, i, j) - self.statistics.lam[i]
        width = width.reshape((-1, *[1] * len(self.statistics.shape)))
        powers = [width**k / math.factorial(k) for k in range(count)]
        moments = tuple(self._trapezoids(kernel * power, i, j)[-1] for power in powers)
        return Integrals(torch.exp(-l[-1]), moments, self._trapezoids(kernel * beta, i, j)[-1])

    def _index(self, lam: Tensor) -> int:
        grid = self.statistics.lam
        value = float(lam.detach())
        check_range(self.statistics, value)
        return min(max(round((value - grid[0].item()) / self.statistics.width), 0), len(grid) - 1)

    def _slice(self, values: Tensor, i: int, j: int) -> Tensor:
        """Nodes i, ..., j in the direction of the step."""
        return values[i : j + 1].double() if i <= j else values[j : i + 1].double().flip(0)

    def _path(self, values: Tensor, i: int, j: int) -> Tensor:
        return self._trapezoids(self._slice(values, i, j), i, j)

    def _trapezoids(self, values: Tensor, i: int, j: int) -> Tensor:
        """Integral from node i up to each of the nodes i, ..., j."""
        width = self.statistics.width if i <= j else -self.statistics.width
        return torch.cat([torch.zeros_like(values[:1]), ((values[1:] + values[:-1]) * (0.5 * width)).cumsum(0)])


class LinearReading:
    """Statistics linear between nodes and integrated to rounding, at the times themselves; differentiable in them."""

    def __init__(self, statistics: EmpiricalStatistics) -> None:
        """Read ``statistics``."""
        self.statistics = statistics
        self.points, self.weights, self.partial = _collocation()

    def node(self, lam: Tensor, start: Tensor) -> Node:
        """Node at ``lam`` for a step from ``start``."""
        _, s, beta, _, _ = self._walk(start, lam, 0)
        return Node(self._at(self.statistics.l, lam), torch.exp(-s), beta)

    def integrals(self, start: Tensor, end: Tensor, count: int) -> Integrals:
        """The step from ``start`` to ``end`` with ``count`` moments."""
        l, _, _, moments, constant = self._walk(start, end, count)
        return Integrals(torch.exp(-l), tuple(moments), constant)

    def _walk(self, start: Tensor, end: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor]:
        """L, S and beta at ``end``, the moments and C, cell by cell."""
        stats = self.statistics
        zero = torch.zeros(stats.shape, dtype=torch.float64, device=stats.l.device)
        l = s = beta = constant = zero
        moments = [zero] * count
        column = (-1, *[1] * len(stats.shape))
        points, weights, partial = (value.to(zero.device) for value in (self.points, self.weights, self.partial))
        for left, right in self._cells(start, end):
            width = right - left
            at = left + width * points
            l_at, s_at, b_at = (self._at(value, at) for value in (stats.l, stats.s, stats.b))
            # Running integrals at the points: the polynomial through them, integrated from the cell's left end.
            l_run, s_run = (total + width * torch.tensordot(partial, v, 1) for total, v in ((l, l_at), (s, s_at)))
            source = torch.exp(-s_run) * b_at
            beta_run = beta + width * torch.tensordot(partial, source, 1)
            kernel = torch.exp(l_run + s_run) * (width * weights).reshape(column)
            away = (at - start).reshape(column)
            moments = [m + (kernel * away**k).sum(0) / math.factorial(k) for k, m in enumerate(moments)]
            constant = constant + (kernel * beta_run).sum(0)
            beta = beta + width * torch.tensordot(weights, source, 1)
            l, s = (total + width * torch.tensordot(weights, v, 1) for total, v in ((l, l_at), (s, s_at)))
        return l, s, beta, moments, constant

    def _cells(self, start: Tensor, end: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The step cut at the nodes between its ends, and further where those are far apart."""
        a, b = float(start.detach()), float(end.detach())
        if not self.statistics.constant:
            check_range(self.statistics, a)
            check_range(self.statistics, b)
        inner = [node for node in self.statistics.lam.tolist() if min(a, b) < node < max(a, b)]
        if a > b:
            inner.reverse()
        ends = [start, *(torch.tensor(node, dtype=torch.float64, device=start.device) for node in inner), end]
        cells = []
        for left, right in pairwise(ends):
            width = right - left
            parts = max(1, math.ceil(abs(width.item()) / WIDEST))
            cells += list(pairwise([left + width * (k / parts) for k in range(parts)] + [right]))
        return cells

    def _at(self, values: Tensor, lam: Tensor) -> Tensor:
        """``values`` at ``lam`` (0-d or (m,)), linear between nodes, the last value beyond the ends."""
        n = len(values) - 1
        place = ((lam - self.statistics.lam[0].to(lam.device)) / self.statistics.width).clamp(0.0, n).to(values.device)
        left = place.detach().floor().long().clamp(max=n - 1)
        fraction = (place - left).reshape((*lam.shape, *[1] * (values.ndim - 1)))
        low, high = values[left].double(), values[left + 1].double()
        return low + fraction * (high - low)


Reading = NodeReading | LinearReading


def reading_of(statistics: EmpiricalStatistics, pred: str) -> Reading:
    """How a step with ``pred`` "v3" or "v3-nodes" reads the statistics.

    Statistics that are the same at every node leave nothing to round, so both then read them at the times themselves.
    """
    return LinearReading(statistics) if pred == "v3" or statistics.constant else NodeReading(statistics)


def _collocation() -> tuple[Tensor, Tensor, Tensor]:
    """Points and weights on [0, 1], and the matrix that integrates a polynomial from 0 to each point."""
    points, weights = (torch.tensor(values, dtype=torch.float64) for values in zip(*gauss_legendre(POINTS), strict=True))
    powers = torch.arange(POINTS, dtype=torch.float64)
    vandermonde = points[:, None] ** powers
    integrals = points[:, None] ** (powers + 1) / (powers + 1)
    return points, weights, torch.linalg.solve(vandermonde, integrals, left=False)


class Reader:
    """What the compiler asks: floats where a node has one number, else tensors of shape E, each computed once."""

    def __init__(self, statistics: EmpiricalStatistics) -> None:
        """Read ``statistics``."""
        self.readings = {pred: reading_of(statistics, pred) for pred in STATISTICAL}
        self._nodes: dict[tuple[str, float, float], tuple[Scalar, Scalar, Scalar]] = {}
        self._steps: dict[tuple[str, float, float], tuple[Scalar, tuple[Scalar, ...], Scalar]] = {}

    def node(self, pred: str, lam: Scalar, start: Scalar) -> tuple[Scalar, Scalar, Scalar]:
        r"""$l_j$, $e^{-S_j}$ and $\beta_j$ of the node at ``lam`` for a step from ``start``."""
        key = (pred, _float(lam), _float(start))
        if key not in self._nodes:
            found = self.readings[pred].node(as_float64(lam), as_float64(start))
            self._nodes[key] = (_number(found.l), _number(found.decay), _number(found.beta))
        return self._nodes[key]

    def step(self, pred: str, start: Scalar, end: Scalar) -> tuple[Scalar, tuple[Scalar, ...], Scalar]:
        r"""$e^{-L_t}$, $(E_0, E_1, \ldots)$ and $C$ of the step from ``start`` to ``end``."""
        key = (pred, _float(start), _float(end))
        if key not in self._steps:
            found = self.readings[pred].integrals(as_float64(start), as_float64(end), MAX_ORDER + 1)
            self._steps[key] = (_number(found.decay), tuple(map(_number, found.moments)), _number(found.constant))
        return self._steps[key]


def _float(value: Scalar) -> float:
    return float(value.detach() if torch.is_tensor(value) else value)


def _number(value: Tensor) -> Scalar:
    return value if value.ndim or value.requires_grad else value.item()

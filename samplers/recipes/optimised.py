r"""A time grid that minimises an error bound and needs no network: DMN (Xue et al. 2024, arXiv:2402.17376).

A multistep solver with x0-predictions computes, in the frame $x / \sigma$, sums $\sum_s \sum_n J_{sn} D_n$ with
$J_{sn} = \int_{\lambda_s}^{\lambda_{s+1}} e^\lambda \ell_n(\lambda) d\lambda$ and $\ell_n$ the Lagrange basis on the step's
nodes. If the prediction at node n is wrong by $\tilde\epsilon_n = \sigma_n^2 / \alpha_n$ (a noise prediction with error
proportional to $\sigma$), the result is wrong by at most the sum over nodes; the grid is where that bound is smallest.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

if TYPE_CHECKING:
    from collections.abc import Sequence

Vector = NDArray[np.float64]

MAX_ORDER = 3
START_UP = 3  # steps whose errors are bounded one by one; from there on a node's weights are added with their signs
LARGEST = 20
SMALLEST_GAP = 1e-3  # of the lambda range


def step_weights(lam: Vector, order: int, steps: NDArray[np.intp]) -> Vector:
    r"""$\int e^\lambda \ell_n(\lambda) d\lambda$ over steps of one order, latest node first, scaled by $e^{-\lambda_s}$.

    Args:
        lam: (n + 1,) increasing values of lambda.
        order: 1..3: how many nodes every step uses.
        steps: (m,) indices of the steps; step s goes from lam[s] to lam[s + 1] with nodes s, s - 1, ...

    Returns:
        (order, m).
    """
    h = lam[steps + 1] - lam[steps]
    zeroth: Vector = np.expm1(h)
    if order == 1:
        return np.stack([zeroth])
    first = np.exp(h) * h - zeroth
    a = lam[steps - 1] - lam[steps]
    if order == 2:
        return np.stack([zeroth - first / a, first / a])
    second = np.exp(h) * h * h - 2 * first
    b = lam[steps - 2] - lam[steps]
    return np.stack(
        [
            zeroth - (a + b) / (a * b) * first + second / (a * b),
            (second - b * first) / (a * (a - b)),
            (second - a * first) / (b * (b - a)),
        ]
    )


def step_orders(n: int) -> list[int]:
    """Orders of the n steps: rising to three and falling to one at the end."""
    return [1 if s in (0, n - 1) else 2 if s in (1, n - 2) else MAX_ORDER for s in range(n)]


def error_bound(lam: Sequence[float] | Vector) -> float:
    """The bound on the final error for the grid ``lam`` (n + 1 increasing values), up to a constant factor."""
    lam = np.asarray(lam, dtype=np.float64)
    orders = np.asarray(step_orders(len(lam) - 1))
    # sigma^2 / alpha of the variance-preserving noise level with this lambda
    error = np.exp(-np.logaddexp(0.0, 2 * lam) + 0.5 * np.logaddexp(0.0, -2 * lam))
    total, combined = 0.0, np.zeros(len(lam))
    for order in range(1, MAX_ORDER + 1):
        steps = np.flatnonzero(orders == order)
        weights = np.exp(lam[steps]) * step_weights(lam, order, steps)
        weights *= np.stack([error[steps - back] for back in range(order)])
        late = steps >= START_UP
        total += float(np.linalg.norm(weights[:, ~late], axis=0).sum())
        for back in range(order):
            np.add.at(combined, steps[late] - back, weights[back, late])
    return total + float(np.abs(combined).sum())


@lru_cache(maxsize=128)
def optimal_lambdas(low: float, high: float, n: int, others: tuple[tuple[float, ...], ...] = ()) -> tuple[float, ...]:
    """The n + 1 values from ``low`` to ``high`` with the smallest `error_bound`.

    Above `LARGEST` steps, where grids hardly differ, the optimum for `LARGEST` is interpolated.

    Args:
        low: lambda of the noisiest time.
        high: lambda of the end.
        n: steps, >= 1.
        others: further grids (n + 1 values each); the search starts from the best of these and the uniform one.
    """
    if n == 1:
        return low, high
    if n > LARGEST:
        places = np.linspace(0, LARGEST, n + 1)
        return tuple(np.interp(places, range(LARGEST + 1), optimal_lambdas(low, high, LARGEST)).tolist())
    starts = [np.linspace(low, high, n + 1), *(np.asarray(grid) for grid in others)]
    span = (high - low) * (1 - n * SMALLEST_GAP)

    def grid(free: Vector) -> Vector:
        share = np.exp(np.append(free, 0.0) - max(0.0, free.max()))
        gaps = (high - low) * SMALLEST_GAP + span * share / share.sum()
        return np.concatenate(([low], low + gaps.cumsum()[:-1], [high]))

    gaps = np.maximum(np.diff(min(starts, key=error_bound)), 2 * (high - low) * SMALLEST_GAP)
    free = np.log(gaps[:-1] / gaps[-1])
    for _ in range(2):  # the bound has kinks, where BFGS may stop early
        free = minimize(lambda z: math.log(error_bound(grid(z))), free, method="BFGS", options={"maxiter": 60}).x
    return tuple(grid(free).tolist())

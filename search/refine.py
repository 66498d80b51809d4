"""After the search over kinds of steps, its numbers: times and coefficients by damped least squares.

S4S (arXiv:2502.17423), generalised solvers (GS) and LD3 (arXiv:2405.15506) find such numbers by stochastic gradients through
the sampler. But a schedule has a few dozen numbers and every noise has many residuals, the case of Levenberg and Marquardt: one
round here does what hundreds of gradient steps do. The network is only ever evaluated forwards, and a number that acts late
needs only the evaluations after it. The result stays a readable schedule with a `Residual` per step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from samplers import SolverSchedule

from .genes import Genes
from .objective import Objective
from .residuals import Residuals
from .space import SearchSpace

DAMPINGS = (0.1, 1.0, 10.0, 100.0)  # tried in every round, times the damping that was best before
DIFFERENCE = {torch.float64: 1e-5}
DIFFERENCE_OTHERWISE = 1e-3


@dataclass(frozen=True)
class Refined:
    """A refined schedule.

    Attributes:
        schedule: the best on the validation noises; the start itself where nothing was better.
        start: validation error of the start.
        value: validation error of the result.
        history: (round, validation error).
        evaluations: network evaluations times samples that were spent.
    """

    schedule: SolverSchedule
    start: float
    value: float
    history: list[tuple[int, float]]
    evaluations: int


def refine(
    schedule: SolverSchedule,
    space: SearchSpace,
    train: Objective,
    validation: Objective,
    *,
    rounds: int = 6,
    coefficients: bool = True,
    difference: float | None = None,
    patience: int = 3,
    progress: Callable[[int, float], None] | None = None,
) -> Refined:
    """Lower the endpoint error by Levenberg-Marquardt rounds on the times and, optionally, on every coefficient of the steps.

    Args:
        schedule: a member of ``space`` without noise.
        space: decides the ends and the order of the times.
        train: endpoint objective whose noises are descended on, all in every round.
        validation: endpoint objective on other noises, which picks the result and stops early.
        rounds: each costs `evaluations_per_round` network evaluations for every noise of ``train``.
        coefficients: also learn additions to every coefficient of the x0-predictions, and to that of the latest state: the
            states before are sums of the same things.
        difference: by which every number is moved to see what it does. None: 1e-5 in float64, else 1e-3; a network that
            computes in half precision needs more, 3e-2.
        patience: rounds without progress on the validation noises after which it stops.
        progress: called with (round, validation error).

    Raises:
        ValueError: a stochastic schedule, or objectives without a converged reference.
    """
    if schedule.stochastic:
        raise ValueError("refinement follows one solution: the schedule must draw no noise")
    if train.reference is None or validation.reference is None:
        raise ValueError("refinement needs endpoint objectives, which have a converged reference")
    genes = Genes(schedule, space, coefficients)
    work = Residuals(genes, train, difference or DIFFERENCE.get(train.x_T.dtype, DIFFERENCE_OTHERWISE))
    best, start = schedule, validation(schedule)
    value, history, spent, waited = start, [(0, start)], len(validation.x_T) * schedule.nfe, 0
    numbers, damping, here = genes.start, 0.01, None
    for k in range(1, rounds + 1):
        loss, slope, curvature = here = here or work.quadratic(numbers)
        if not math.isfinite(loss):
            break
        tried = []
        for factor in DAMPINGS:
            step = _damped(slope, curvature, damping * factor)
            tried.append((work.loss(numbers + step), damping * factor, numbers + step))
        found, damping, moved = min(tried, key=lambda trial: trial[0])
        if not found < loss:  # the quadratic is good nearer by only
            continue
        numbers, damping, here = moved, max(damping, 1e-8), None
        candidate = genes.plain(numbers)
        measured = validation(candidate)
        spent += len(validation.x_T) * schedule.nfe
        history.append((k, measured))
        if progress is not None:
            progress(k, measured)
        if measured < value:
            best, value, waited = candidate, measured, 0
        elif (waited := waited + 1) >= patience:
            break
    return Refined(best, start, value, history, spent + work.evaluations)


def evaluations_per_round(nfe: int) -> int:
    """Network evaluations per noise of a round, for steps of one evaluation.

    The coefficients of step i, of a state and of i + 1 x0-predictions, are felt by the nfe - 1 - i evaluations after it; time
    i > 0 by the nfe - i from it on. Then there are the start and the damped trials.
    """
    coefficients = sum((i + 2) * (nfe - 1 - i) for i in range(nfe))
    return coefficients + sum(range(1, nfe)) + (1 + len(DAMPINGS)) * nfe


def _damped(slope: Tensor, curvature: Tensor, damping: float) -> Tensor:
    """Marquardt's step: numbers are measured by what they do, so damping means the same for all."""
    scale = curvature.diagonal().clamp_min(1e-12 * curvature.diagonal().max()).rsqrt()
    eigenvalues, basis = torch.linalg.eigh(scale[:, None] * curvature * scale)
    return -scale * (basis @ ((basis.T @ (scale * slope)) / (eigenvalues.clamp_min(0.0) + damping)))

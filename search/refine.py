"""After the search over kinds of steps, its numbers: times and coefficients by damped least squares.

S4S (arXiv:2502.17423), generalised solvers (GS) and LD3 (arXiv:2405.15506) find such numbers by stochastic gradients through
the sampler. But a schedule has a few dozen numbers and every noise has many residuals, the case of Levenberg and Marquardt: one
round here does what hundreds of gradient steps do. The network is only ever evaluated forwards, and a number that acts late
needs only the evaluations after it. The result stays a readable schedule with a `Residual` per step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch import Tensor
from torch.autograd.functional import jacobian

from samplers import Residual, SolverSchedule, Tableau
from samplers.engine import Engine

from .converged import of_rows
from .objective import Objective
from .space import NARROWEST, SearchSpace

POWER = 0.75
DAMPINGS = (0.1, 1.0, 10.0, 100.0)  # tried in every round, times the damping that was best before
DIFFERENCE = {torch.float64: 1e-5}
DIFFERENCE_OTHERWISE = 1e-3
HELD = 2**28  # bytes of derivatives at once


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
    numbers, damping = genes.start, 0.01
    for k in range(1, rounds + 1):
        loss, slope, curvature = work.quadratic(numbers)
        tried = []
        for factor in DAMPINGS:
            step = _damped(slope, curvature, damping * factor)
            tried.append((work.loss(numbers + step), damping * factor, numbers + step))
        found, damping, moved = min(tried, key=lambda trial: trial[0])
        if not found < loss:  # the quadratic is good nearer by only
            continue
        numbers, damping = moved, max(damping, 1e-8)
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


class Residuals:
    """Differences to the converged solutions, and how they move with a schedule's numbers.

    The loss is a mean over samples' mean squares to the power `POWER`: in the RMSE itself the few samples that end in another
    mode than they should outweigh all others.
    """

    def __init__(self, genes: Genes, objective: Objective, difference: float) -> None:
        self.genes, self.objective, self.difference, self.evaluations = genes, objective, difference, 0
        assert objective.reference is not None
        self.reference = objective.reference.flatten(1)
        held = 8 * len(genes.start) * self.reference.shape[1]
        self.parts = torch.arange(len(self.reference)).split(max(1, HELD // held))

    def loss(self, numbers: Tensor) -> float:
        """Mean over all samples; infinite where one is."""
        tableau, total = self._tableau(self.genes.physical(numbers)), 0.0
        for rows in self.parts:
            end = self._finish(Engine(tableau, self._noises(rows)), rows)
            total += float(self._difference_to(end, rows).square().mean(1).pow(POWER).sum())
        mean = total / len(self.reference)
        return mean if math.isfinite(mean) else math.inf

    def quadratic(self, numbers: Tensor) -> tuple[float, Tensor, Tensor]:
        """The loss, its slope (P,) and its Gauss-Newton curvature (P, P), with the samples' weights as they are now."""
        here = self.genes.physical(numbers)
        chain = jacobian(self.genes.physical, numbers)
        loss, slope = 0.0, numbers.new_zeros(len(numbers))
        curvature = numbers.new_zeros(len(numbers), len(numbers))
        for rows in self.parts:
            r, moves = self.derivatives(here, rows)
            squares = r.square().mean(1)
            loss += float(squares.pow(POWER).sum())
            weights = squares.clamp_min(1e-16).pow((POWER - 1) / 2)[:, None]
            flat = chain.T @ (moves * weights).flatten(1).to(chain)
            curvature += flat @ flat.T
            slope += flat @ (r * weights).flatten().to(chain)
        return loss / len(self.reference), slope, curvature

    def derivatives(self, here: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Residuals (B, D) of some rows, and what moving each physical number by one does to them (P, B, D)."""
        tableau = self._tableau(here)
        engine, before, answers = Engine(tableau, self._noises(rows)), [], []
        while engine.query is not None:
            before.append(engine.branch(tableau))
            answers.append(self._answer(engine, rows))
            engine.tell(answers[-1])
        base, found = engine.x, []
        for k in range(len(here)):
            nudged = here.clone()
            nudged[k] += self.difference
            other = self._tableau(nudged)
            changed = [a != b for a, b in zip(_stages(tableau), _stages(other), strict=True)]
            if changed[0]:  # an analytic first step
                run = Engine(other, self._noises(rows))
            else:
                place = changed.index(True, 1) - 1 if any(changed) else len(before) - 1
                run = before[place].branch(other)
                if _asks(tableau, place) == _asks(other, place):
                    run.tell(answers[place])
            found.append((self._finish(run, rows) - base).double().flatten(1) / self.difference)
        return self._difference_to(base, rows), torch.stack(found)

    def _tableau(self, physical: Tensor) -> Tableau:
        schedule = self.genes.schedule_of(physical)
        mean = self.objective.first_x0 if schedule.steps[0].eval.source == "average_x0" else None
        return Tableau.build(schedule, self.objective.noise_schedule, first_x0=mean)

    def _noises(self, rows: Tensor) -> Tensor:
        x = self.objective.x_T[rows]
        return x.to(torch.promote_types(x.dtype, torch.float32))

    @torch.no_grad()
    def _answer(self, engine: Engine, rows: Tensor) -> Tensor:
        assert engine.query is not None
        self.evaluations += len(rows)
        return of_rows(self.objective.denoiser, rows)(engine.x, engine.query.t)

    def _finish(self, engine: Engine, rows: Tensor) -> Tensor:
        while engine.query is not None:
            engine.tell(self._answer(engine, rows))
        return engine.x

    def _difference_to(self, x: Tensor, rows: Tensor) -> Tensor:
        return (x.flatten(1) - self.reference[rows]).double()


def _stages(tableau: Tableau) -> list[Any]:
    """The numbers of the opening, then of every stage."""
    return [_numbers(tableau.opening), *((_asks(tableau, i), _numbers(s.rows)) for i, s in enumerate(tableau.stages))]


def _asks(tableau: Tableau, stage: int) -> float:
    return float(tableau.stages[stage].query.t)


def _numbers(rows: Sequence[Any]) -> list[Any]:
    return [c.tolist() if torch.is_tensor(c) else c for row in rows for _, c in row.terms]


class Genes:
    """A schedule's continuous genes: what a round changes, and what it means.

    The numbers that are changed are logarithms of gaps, which keep times in order, and additions to coefficients. The physical
    numbers are the times' lambdas, one each, and the same additions.
    """

    def __init__(self, schedule: SolverSchedule, space: SearchSpace, coefficients: bool) -> None:
        self.schedule, self.space = space.adopt(schedule) if schedule.times[-1] != space.final_time else schedule, space
        logs = torch.from_numpy(space.gaps(self.schedule)).log()
        self.gaps, n = len(logs), len(self.schedule.steps)
        # The last step to sigma = 0 returns x0-predictions alone: states carry noise there.
        frozen = n - 1 if space.final_time == 0.0 else n
        self.widths: list[int] = []  # of every step's additions: to the latest state, then to the x0-predictions
        values = [logs]
        for i, step in enumerate(self.schedule.steps if coefficients else ()):
            old = step.delta or Residual()
            own = [*_padded(old.x, i + 1)[i:], *_padded(old.x0, i + 1)][1 if i == frozen else 0 :]
            self.widths.append(len(own))
            values.append(torch.tensor(own, dtype=torch.float64))
        self.start = torch.cat(values)

    def physical(self, numbers: Tensor) -> Tensor:
        """(P,) numbers to (P - 1,) lambdas of the inner times, and additions."""
        logs = numbers[: self.gaps]
        shares = torch.softmax(logs, 0) * (1 - NARROWEST * len(logs)) + NARROWEST
        low, high = self.space.lambda_range
        return torch.cat([low + (high - low) * shares.cumsum(0)[:-1], numbers[self.gaps :]])

    def schedule_of(self, physical: Tensor) -> SolverSchedule:
        """The schedule with 0-d tensors in place of numbers, so that its tableau has the same structure for all of them."""
        inner = self.gaps - 1
        times = (self.schedule.times[0], *self.space.noise_schedule.t_of_lam(physical[:inner]), self.schedule.times[-1])
        steps = list(self.schedule.steps)
        for i, own in enumerate(physical[inner:].split(self.widths) if self.widths else ()):
            before = _padded((steps[i].delta or Residual()).x, i + 1)[:i]
            x = (*before, own[0]) if len(own) == i + 2 else ()
            steps[i] = msgspec.structs.replace(steps[i], delta=Residual(x=x, x0=tuple(own[-i - 1 :])))
        return msgspec.structs.replace(self.schedule, times=times, steps=tuple(steps))

    def plain(self, numbers: Tensor) -> SolverSchedule:
        """The schedule with the numbers as they are now, rounded to nine digits."""
        symbolic = self.schedule_of(self.physical(numbers))
        times = (symbolic.times[0], *map(_number, symbolic.times[1:-1]), symbolic.times[-1])
        steps = list(symbolic.steps)
        for i in range(len(self.widths)):
            delta = steps[i].delta
            assert delta is not None
            rounded = Residual(x=tuple(map(_number, delta.x)), x0=tuple(map(_number, delta.x0)))
            steps[i] = msgspec.structs.replace(steps[i], delta=rounded)
        return msgspec.structs.replace(symbolic, times=times, steps=tuple(steps))


def _padded(values: tuple[float, ...], n: int) -> list[float]:
    return [*values, *[0.0] * (n - len(values))]


def _number(value: Tensor | float) -> float:
    return float(f"{float(value):.9g}")

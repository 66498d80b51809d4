"""How far a schedule's samples are from the converged solutions, and how that moves with its numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.functional import jacobian

from samplers import Tableau
from samplers.engine import Engine

from .converged import of_rows
from .genes import Genes
from .objective import Objective

POWER = 0.75
HELD = 2**28  # bytes of derivatives at once


class Residuals:
    """Differences to the converged solutions, and how they move with a schedule's numbers.

    The loss is a mean over samples' mean squares to the power `POWER`: in the RMSE itself the few samples that end in another
    mode than they should outweigh all others.
    """

    def __init__(self, genes: Genes, objective: Objective, difference: float) -> None:
        """Of an endpoint objective; every number is moved by ``difference`` to see what it does."""
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

"""After the search: finalists re-ranked on fresh noises, the winner reported on a third set, its file with provenance."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import msgspec
import torch
from torch import Tensor

from samplers import SolverSchedule

from .ledger import Ledger, remembered
from .objective import Objective
from .space import SearchSpace
from .starts import baselines

RESAMPLES = 1000
RUNGS = ((8, 96), (24, 24))  # a look at all baselines on 8 noises, at the best 96 on 24, at the best 24 on all


@dataclass(frozen=True)
class Score:
    """An error on held-out noises.

    Attributes:
        name: of the schedule.
        value: RMSE to the converged solution.
        low: lower end of a 95% bootstrap interval over the noises.
        high: upper end.
        schedule: that was scored.
    """

    name: str
    value: float
    low: float
    high: float
    schedule: SolverSchedule

    def to_dict(self) -> dict[str, Any]:
        """Everything but the schedule, JSON-native."""
        return {"name": self.name, "value": self.value, "interval": [self.low, self.high]}


def score(schedule: SolverSchedule, objective: Objective, name: str = "") -> Score:
    """RMSE with a bootstrap interval over the objective's noises.

    Raises:
        ValueError: an objective without a converged reference.
    """
    if objective.reference is None:
        raise ValueError("scores need an endpoint objective, which has a converged reference")
    errors = _squared_errors(objective.samples(schedule), objective.reference)
    picks = torch.randint(len(errors), (RESAMPLES, len(errors)), generator=torch.Generator().manual_seed(0))
    spread = errors[picks].mean(1).sqrt().quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return Score(name or schedule.name, errors.mean().sqrt().item(), spread[0].item(), spread[1].item(), schedule)


def _squared_errors(x: Tensor, reference: Tensor) -> Tensor:
    return (x.double() - reference.double()).square().flatten(1).mean(1).cpu()


def ranked(candidates: Sequence[SolverSchedule], rankers: Sequence[Callable[[SolverSchedule], float]]) -> list[SolverSchedule]:
    """The candidates by their mean rank over the rankers, each on noises that no search has seen; the best first.

    Args:
        candidates: finalists.
        rankers: objectives: an endpoint error, a distribution distance, or both.

    Raises:
        ValueError: no candidates or no rankers.
    """
    if not candidates or not rankers:
        raise ValueError("selection needs at least one candidate and one ranker")
    ranks = [0.0] * len(candidates)
    for ranker in rankers:
        values = [ranker(candidate) for candidate in candidates]
        for i, value in enumerate(values):
            ranks[i] += sum(other < value for other in values)
    return [candidates[i] for i in sorted(range(len(candidates)), key=lambda i: ranks[i])]


@dataclass(frozen=True)
class Classic:
    """A classic solver on a classic grid, and what it is worth on the selector's noises."""

    text: str
    value: float
    schedule: SolverSchedule

    @property
    def kind(self) -> str:
        """Either "plain" or "analytic", which has an analytic first step."""
        return "analytic" if self.schedule.analytic_first_step else "plain"


def classics(
    space: SearchSpace, selector: Objective, *, nfe: int | None = None, limit: int | None = None, ledger: Ledger | None = None
) -> list[Classic]:
    """Classic solvers x grids, the best few by halving: all on few noises, fewer on more, the last on all (see `RUNGS`).

    Args:
        space: its noise schedule and final time.
        selector: endpoint objective.
        nfe: of the baselines; the space's when None.
        limit: only the first baselines of the list.
        ledger: keeps evaluations on all noises, so that a search that starts from them has them.

    Returns:
        Those that reached the last rung, plain and analytic ones, best first.
    """
    listed = islice(baselines(space.noise_schedule, nfe or space.nfe, final_time=space.final_time), limit)
    left = [Classic(text, 0.0, schedule) for text, schedule in listed]
    for noises, stay in RUNGS:
        if noises < len(selector.x_T) and stay < len(left):
            few = selector.head(noises)
            left = sorted((replace(c, value=few(c.schedule)) for c in left), key=lambda c: c.value)
            # Half of the places for either kind, or the better kind would leave no one to compare with.
            left = [c for kind in ("plain", "analytic") for c in [c for c in left if c.kind == kind][: stay // 2]]
    worth = selector if ledger is None else remembered(selector, ledger)
    return sorted((replace(c, value=worth(c.schedule)) for c in left), key=lambda c: c.value)


def screening_cost(count: int, noises: int) -> int:
    """Samples that `classics` draws for ``count`` baselines and a selector of so many noises."""
    total = 0
    for few, stay in RUNGS:
        if few < noises and stay < count:
            total, count = total + few * count, stay
    return total + noises * count


def first_of_each_kind(found: Sequence[Classic]) -> dict[str, Classic]:
    """The first "plain" and the first "analytic" one."""
    return {classic.kind: classic for classic in reversed(found)}


def best_of_each_kind(found: Sequence[Classic], test: Objective) -> dict[str, Score]:
    """The first of each kind, scored on the test's noises."""
    return {kind: score(classic.schedule, test, classic.text) for kind, classic in first_of_each_kind(found).items()}


def with_provenance(schedule: SolverSchedule, name: str, facts: Mapping[str, Any]) -> SolverSchedule:
    """The schedule as it is shipped: with a name and where it comes from.

    Raises:
        ValueError: facts that are not finite numbers where they are numbers.
    """
    _finite(facts, "provenance")
    return msgspec.structs.replace(schedule, name=name, clip=None, provenance=dict(facts))


def _finite(value: Any, where: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _finite(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for item in value:
            _finite(item, where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}, which is no result")

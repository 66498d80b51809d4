"""After the search: finalists re-ranked on fresh noises, the winner reported on a third set, its file with provenance."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import msgspec
import torch
from torch import Tensor

from samplers import SolverSchedule

from .objective import Objective
from .space import SearchSpace
from .starts import baselines

RESAMPLES = 1000
QUICK, SHORTLIST = 16, 12  # noises of the first look at all baselines; how many are then looked at closely


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


def select(candidates: Sequence[SolverSchedule], rankers: Sequence[Callable[[SolverSchedule], float]]) -> SolverSchedule:
    """The candidate with the best mean rank over the rankers, each on noises that no search has seen.

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
    return candidates[min(range(len(candidates)), key=lambda i: ranks[i])]


def best_baselines(
    space: SearchSpace, selector: Objective, test: Objective, *, nfe: int | None = None, limit: int | None = None
) -> dict[str, Score]:
    """The best classic solver on the best grid, chosen on the selector's noises and scored on the test's.

    Args:
        space: its noise schedule and final time.
        selector: objective for the choice.
        test: objective for the score.
        nfe: of the baselines; the space's when None.
        limit: only the first baselines of the list.

    Returns:
        "plain" without and "analytic" with an analytic first step. All are tried on the first `QUICK` noises, and the best
        `SHORTLIST` of each kind on all.
    """
    quick = selector.head(QUICK)
    listed = islice(baselines(space.noise_schedule, nfe or space.nfe, final_time=space.final_time), limit)
    kinds: dict[str, list[tuple[float, str, SolverSchedule]]] = {}
    for text, schedule in listed:
        kinds.setdefault("analytic" if schedule.analytic_first_step else "plain", []).append((quick(schedule), text, schedule))
    best = {}
    for kind, tried in kinds.items():
        shortlist = sorted(tried, key=lambda item: item[0])[:SHORTLIST]
        _, text, schedule = min(shortlist, key=lambda item: selector(item[2]))
        best[kind] = score(schedule, test, text)
    return best


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

"""The Optuna side of strategies that propose whole schedules: one attribute a trial, seeds first, no duplicates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from samplers import SolverSchedule

from ..space import SearchSpace

SCHEDULE = "schedule"  # user attribute: the schedule's JSON
RETRY = "failed_trial"  # system attribute that Optuna's retry callback sets


def schedule_of(trial: FrozenTrial) -> SolverSchedule:
    """The schedule that a trial has, or had, to evaluate."""
    return SolverSchedule.from_dict(json.loads(trial.user_attrs[SCHEDULE]))


def schedule_text(schedule: SolverSchedule) -> str:
    """A schedule as the attribute's text."""
    return json.dumps(schedule.to_dict(), separators=(",", ":"))


class Proposer:
    """What differs between strategies: the next schedule, given what is known.

    Subclasses override `propose`; everything about trials, seeds and duplicates is `ScheduleSampler`'s.
    """

    def propose(
        self, pool: Sequence[tuple[float, SolverSchedule]], rng: np.random.Generator, progress: float
    ) -> SolverSchedule:
        """The next schedule to evaluate.

        Args:
            pool: all evaluated schedules with their values, best first.
            rng: seeded by the study's seed and the trial's number, so that workers differ and runs repeat.
            progress: share of the budget after the seeds that is spent, 0..1.
        """
        raise NotImplementedError


class RandomProposer(Proposer):
    """Independent draws from the space."""

    def __init__(self, space: SearchSpace) -> None:
        """Remember the space."""
        self.space = space

    def propose(
        self, pool: Sequence[tuple[float, SolverSchedule]], rng: np.random.Generator, progress: float
    ) -> SolverSchedule:
        """A random member."""
        return self.space.random(rng)


class ScheduleSampler(BaseSampler):
    """Gives every trial its schedule before it starts; nothing is suggested parameter by parameter.

    Seeds are handed out by the trial's rank among trials that are no retries, which every worker computes alike. A retried
    trial already has its schedule and keeps it.
    """

    def __init__(self, proposer: Proposer, seeds: Sequence[SolverSchedule], *, budget: int, seed: int) -> None:
        """Set up.

        Args:
            proposer: makes schedules once the seeds are handed out.
            seeds: evaluated first, in this order.
            budget: COMPLETE trials that the search will make.
            seed: of all randomness.
        """
        self.proposer, self.seeds, self.budget, self.seed = proposer, list(seeds), budget, seed
        self._independent = RandomSampler(seed=seed)
        self._known: dict[int, tuple[float | None, SolverSchedule]] = {}

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Choose the trial's schedule and store it with the trial."""
        if SCHEDULE in trial.user_attrs:
            return
        trials = study.get_trials(deepcopy=False)
        rank = sum(1 for other in trials if other.number < trial.number and RETRY not in other.system_attrs)
        schedule = self.seeds[rank] if rank < len(self.seeds) else self._propose(trials, trial.number)
        text = schedule_text(schedule)
        trial.user_attrs[SCHEDULE] = text
        study._storage.set_trial_user_attr(trial._trial_id, SCHEDULE, text)

    def _propose(self, trials: Sequence[FrozenTrial], number: int) -> SolverSchedule:
        pool, taken = [], set()
        for other in trials:
            known = self._read(other)
            if known is None:
                continue
            taken.add(known[1].digest)
            if known[0] is not None:
                pool.append(known)
        pool.sort(key=lambda item: item[0])
        rng = np.random.default_rng([self.seed, number])
        first = len(self.seeds)
        progress = min(max(len(pool) - first, 0) / max(self.budget - first, 1), 1.0)
        for _ in range(50):
            schedule = self.proposer.propose(pool, rng, progress)
            if schedule.digest not in taken:
                break
        return schedule

    def _read(self, trial: FrozenTrial) -> tuple[float | None, SolverSchedule] | None:
        """A trial's value (None while it has none) and schedule, parsed once."""
        known = self._known.get(trial.number)
        if known is not None and (known[0] is not None or trial.state != TrialState.COMPLETE):
            return known
        if SCHEDULE not in trial.user_attrs:
            return None
        value = trial.value if trial.state == TrialState.COMPLETE else None
        self._known[trial.number] = (value, schedule_of(trial) if known is None else known[1])
        return self._known[trial.number]

    # ---- what Optuna asks of every sampler -------------------------------------------------------------------------

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Nothing is sampled parameter by parameter."""
        return {}

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        """Nothing, likewise."""
        return {}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """For parameters that somebody else's objective may add: uniform."""
        return self._independent.sample_independent(study, trial, param_name, param_distribution)

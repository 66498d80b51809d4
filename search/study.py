"""Searching: Optuna studies with our proposals in them, in one process or in any number of workers on one storage."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import optuna
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.study import MaxTrialsCallback, Study
from optuna.trial import FrozenTrial, Trial, TrialState

from samplers import NoiseSchedule, SolverSchedule

from .ledger import Ledger, engine_options, evaluation, patiently, storage_url
from .space import SearchSpace
from .starts import seeds as baseline_seeds
from .strategies import (
    SCHEDULE,
    STRATEGIES,
    EvolutionProposer,
    RandomProposer,
    S3Proposer,
    ScheduleSampler,
    as_parameters,
    everything,
    schedule_of,
    schedule_text,
    start_of,
    times_and_relaxations,
)

SEED_SHARE = 0.4  # of the budget at most
HEARTBEAT, GRACE = 30, 120  # seconds: a worker says it is alive; after that long a silence its trial is given to another
EVALUATION, SETTINGS = "evaluation", "fewstep"


class Scorer(Protocol):
    """What is searched on: `search.Objective`, or any function of a schedule."""

    def __call__(self, schedule: SolverSchedule) -> float:
        """The value, lower is better."""
        ...


@dataclass(frozen=True)
class TrialRecord:
    """One COMPLETE trial.

    Attributes:
        number: Optuna's.
        value: of the objective.
        schedule: that was evaluated.
        seconds: its evaluation took; of the first one where the ledger knew it.
        terms: the objective's parts.
        cached: whether the ledger knew it.
    """

    number: int
    value: float
    schedule: SolverSchedule
    seconds: float
    terms: dict[str, float]
    cached: bool


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        best: the best schedule by the objective that was searched on: re-rank before believing the value.
        value: its value.
        trials: all COMPLETE trials in order.
        strategy: that made them.
        stages: S3's stages in this process: trials, Kendall's tau, scale of the moves.
    """

    best: SolverSchedule
    value: float
    trials: list[TrialRecord]
    strategy: str
    stages: list[dict[str, float]] = field(default_factory=list)

    def top(self, k: int) -> list[TrialRecord]:
        """The k best distinct schedules, best first."""
        best: dict[str, TrialRecord] = {}
        for record in sorted(self.trials, key=lambda r: r.value):
            best.setdefault(record.schedule.digest, record)
        return list(best.values())[:k]


def run_search(
    space: SearchSpace,
    objective: Scorer,
    strategy: str = "s3",
    trials: int = 200,
    storage: str | None = None,
    seed: int = 0,
    *,
    study_name: str | None = None,
    warm_start: Sequence[SolverSchedule] = (),
    seeds: int | None = None,
    heartbeat: int = HEARTBEAT,
    grace: int = GRACE,
    progress: Callable[[Study, FrozenTrial], None] | None = None,
) -> SearchResult:
    """Search until the study has ``trials`` COMPLETE trials, alone or beside other workers that make the same call.

    Args:
        space: the schedules.
        objective: an `Objective`, or any function schedule -> float; NaN and infinities become `PENALTY`.
        strategy: "s3", "evolution" (the published loop), "random", "tpe", "cmaes" (times and relaxations) or "gp" (a few
            hundred trials at most).
        trials: COMPLETE trials of the study, earlier runs and other workers included. All strategies but random evaluate
            baselines first, in at most 40% of them.
        storage: None keeps the study in memory; a file name or ``sqlite:///FILE`` for one machine, ``postgresql://...`` for
            many. The same call resumes.
        seed: of all randomness.
        study_name: in the storage; made of space, objective, strategy and seed when None.
        warm_start: schedules to evaluate first, as those of a neighbouring NFE; adopted into the space.
        seeds: how many schedules are evaluated before any is proposed, warm starts included; at most 40% of the trials, which
            None means.
        heartbeat: seconds between a worker's signs of life (RDB storages).
        grace: seconds of silence after which a trial is failed and retried.
        progress: called after every trial of this process.

    Raises:
        ValueError: an unknown strategy or storage, a budget below 1, an objective that does not fit the space, or a study of
            that name that was made with other settings.
    """
    _check(space, objective, strategy, trials)
    space = space.with_mean(getattr(objective, "first_x0", None) is not None)
    url = None if storage is None else storage_url(storage)
    ledger = Ledger(url)
    first = _first(space, trials, warm_start, seeds)
    suggest, sampler = _strategy(strategy, space, trials, seed, first)
    name = study_name or _study_name(space, objective, strategy, seed)
    study = _open_study(name, url, sampler, heartbeat, grace)
    try:
        _claim(study, _settings(space, objective, strategy), space, strategy, first)
        run = _runner(objective, ledger, suggest)
        callbacks = [MaxTrialsCallback(trials, states=(TrialState.COMPLETE,)), *([] if progress is None else [progress])]
        if len(_complete(study)) < trials:
            try:
                study.optimize(run, callbacks=callbacks)
            except KeyboardInterrupt:
                _requeue(study, run.schedule)
                raise
        records = [_record(trial) for trial in _complete(study)]
    finally:
        ledger.close()
    best = min(records, key=lambda record: record.value)
    stages = getattr(getattr(sampler, "proposer", None), "history", [])
    return SearchResult(best.schedule, best.value, records, strategy, list(stages))


def _check(space: SearchSpace, objective: Scorer, strategy: str, trials: int) -> None:
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown strategy {strategy!r}; known: {', '.join(STRATEGIES)}")
    if isinstance(trials, bool) or not isinstance(trials, int) or trials < 1:
        raise ValueError(f"trials must be a whole number of at least 1, got {trials!r}")
    noise: NoiseSchedule | None = getattr(objective, "noise_schedule", None)
    if noise is not None and noise.kind != space.noise_schedule.kind:
        raise ValueError(f"the objective's noise schedule is {noise.kind}, the space's {space.noise_schedule.kind}")
    if space.noise and getattr(objective, "reference", None) is not None:
        raise ValueError("steps with noise have no endpoint to compare: use Objective.distance or SearchSpace(noise=False)")
    final = getattr(objective, "final_time", space.final_time)
    if final != space.final_time:
        raise ValueError(f"the objective's reference ends at {final:g}, the space's schedules at {space.final_time:g}")


def _strategy(
    strategy: str, space: SearchSpace, trials: int, seed: int, first: Sequence[SolverSchedule]
) -> tuple[Callable[[Trial], SolverSchedule] | None, BaseSampler]:
    """How a trial gets its schedule: from its parameters, or from the sampler (None)."""
    proposers = {
        "s3": lambda: S3Proposer(space, budget=trials, seed=seed),
        "evolution": lambda: EvolutionProposer(space),
        "random": lambda: RandomProposer(space),
    }
    if strategy in proposers:
        return None, ScheduleSampler(proposers[strategy](), [] if strategy == "random" else first, budget=trials, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # experimental arguments
        if strategy == "cmaes":
            sampler = optuna.samplers.CmaEsSampler(
                x0=start_of(space), sigma0=0.4, seed=seed, warn_independent_sampling=False, lr_adapt=False
            )
            return times_and_relaxations(space), sampler
        if strategy == "gp":
            return everything(space), optuna.samplers.GPSampler(seed=seed)
        return everything(space), optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)


def _first(space: SearchSpace, trials: int, warm_start: Sequence[SolverSchedule], seeds: int | None) -> list[SolverSchedule]:
    allowed = max(int(SEED_SHARE * trials), 1)
    return baseline_seeds(space, allowed if seeds is None else min(seeds, allowed), warm_start)


def _open_study(name: str, url: str | None, sampler: BaseSampler, heartbeat: int, grace: int) -> Study:
    def make() -> Study:
        storage: BaseStorage | None = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            if url is not None:
                storage = RDBStorage(
                    url,
                    engine_kwargs=engine_options(url),
                    heartbeat_interval=heartbeat,
                    grace_period=grace,
                    heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
                )
            return optuna.create_study(study_name=name, storage=storage, sampler=sampler, load_if_exists=True)

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return patiently(make)


def _study_name(space: SearchSpace, objective: Scorer, strategy: str, seed: int) -> str:
    identity = getattr(objective, "identity", "function")
    return f"{strategy}-nfe{space.nfe}-seed{seed}-{identity}"


def _settings(space: SearchSpace, objective: Scorer, strategy: str) -> dict[str, Any]:
    kept = ("nfe", "final_time", "max_order", "predictions", "axes", "sources", "correctors", "evaluation_shifts", "noise")
    described = {key: getattr(space, key) for key in kept}
    described |= {"noise_schedule": space.noise_schedule.kind, "strategy": strategy}
    described["objective"] = getattr(objective, "settings", {})
    return json.loads(json.dumps(described))


def _claim(
    study: Study,
    settings: dict[str, Any],
    space: SearchSpace,
    strategy: str,
    first: Sequence[SolverSchedule],
) -> None:
    """The first worker writes the settings and hands baselines to Optuna's samplers; later ones must agree."""
    known = study.user_attrs.get(SETTINGS)
    if known is not None and known != settings:
        changed = sorted(key for key in {*known, *settings} if known.get(key) != settings.get(key))
        raise ValueError(
            f"study {study.study_name!r} was made with other settings ({', '.join(changed)}); choose another study_name"
        )
    if known is None:
        study.set_user_attr(SETTINGS, settings)
        if strategy in ("tpe", "gp"):
            for schedule in first[:20]:
                study.enqueue_trial(as_parameters(space, schedule), skip_if_exists=True)


class _runner:
    """Evaluate a trial's schedule, or find it in the ledger."""

    def __init__(self, objective: Scorer, ledger: Ledger, suggest: Callable[[Trial], SolverSchedule] | None) -> None:
        self.objective, self.ledger, self.suggest = objective, ledger, suggest
        self.schedule: SolverSchedule | None = None

    def __call__(self, trial: Trial) -> float:
        if self.suggest is None:
            self.schedule = SolverSchedule.from_dict(json.loads(trial.user_attrs[SCHEDULE]))
        else:
            self.schedule = self.suggest(trial)
            trial.set_user_attr(SCHEDULE, schedule_text(self.schedule))
        record = evaluation(self.objective, self.schedule, self.ledger)
        trial.set_user_attr(EVALUATION, record)
        return float(record["terms"]["value"])


def _requeue(study: Study, schedule: SolverSchedule | None) -> None:
    """After Ctrl-C: the schedule that was being evaluated waits for whoever goes on."""
    if schedule is not None:
        waiting = optuna.create_trial(
            state=TrialState.WAITING,
            user_attrs={SCHEDULE: schedule_text(schedule)},
            system_attrs={"failed_trial": len(study.get_trials(deepcopy=False)) - 1},
        )
        study.add_trial(waiting)


def _complete(study: Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def _record(trial: FrozenTrial) -> TrialRecord:
    evaluation = trial.user_attrs.get(EVALUATION, {})
    assert trial.value is not None
    return TrialRecord(
        trial.number,
        trial.value,
        schedule_of(trial),
        evaluation.get("seconds", 0.0),
        evaluation.get("terms", {}),
        evaluation.get("cached", False),
    )

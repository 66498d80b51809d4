"""Schedules as flat parameters, for Optuna's own samplers: TPE and GP over all genes, CMA-ES over times and relaxations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from optuna.trial import Trial

from samplers import Corrector, Evaluation, SolverSchedule, StepStrategy, recipe

from ..space import SearchSpace

GAP, RELAX = (-2.5, 2.5), (-0.6, 0.6)  # ranges: log of a gap over the mean one; relaxation of the first derivative
STRUCTURE = "deis:order=3,grid=lambda,clip=none"  # what CMA-ES keeps the discrete genes of: the best-known baseline

Suggest = Callable[[Trial], SolverSchedule]


def everything(space: SearchSpace) -> Suggest:
    """Every gene is a parameter; genes that a step cannot use are suggested all the same and ignored."""
    predictions = [p for p in ("x0", "eps", "mixed", "flow") if p in (space.predictions or ())]
    sources = ["model", *space.sources]

    def suggest(trial: Trial) -> SolverSchedule:
        source = trial.suggest_categorical("source", sources)
        n = space.nfe + (source != "model")
        gaps = np.exp([trial.suggest_float(f"gap{i}", *GAP) for i in range(space.nfe + 1)])[:n]
        steps = [_step(trial, space, i, predictions) for i in range(space.nfe + 1)][:n]
        steps[0] = StepStrategy(pred=steps[0].pred, corr=steps[0].corr, eval=Evaluation(source=source))
        return space.schedule(gaps, tuple(steps))

    return suggest


def _step(trial: Trial, space: SearchSpace, i: int, predictions: list[str]) -> StepStrategy:
    order = trial.suggest_int(f"order{i}", 1, space.max_order)
    pred: Any = trial.suggest_categorical(f"pred{i}", predictions)
    mixed = trial.suggest_float(f"mix{i}", 0.0, 1.0)
    relax = trial.suggest_float(f"relax{i}", *RELAX)
    corrected = trial.suggest_categorical(f"corr{i}", [False, True]) and space.correctors
    if pred == "mixed":
        pred = (mixed, mixed - 1.0)
    return StepStrategy(
        order=order,
        pred=pred,
        axis="t" if pred == "flow" else "lambda",
        relax=(relax,) if order > 1 else (),
        corr=Corrector(order=order + 1) if corrected else None,
    )


def times_and_relaxations(space: SearchSpace) -> Suggest:
    """Times and relaxations alone; the discrete genes are those of the best-known baseline."""
    base = space.adopt(recipe(STRUCTURE, space.noise_schedule, space.nfe))

    def suggest(trial: Trial) -> SolverSchedule:
        gaps = np.exp([trial.suggest_float(f"gap{i}", *GAP) for i in range(len(base.steps))])
        steps = []
        for i, step in enumerate(base.steps):
            relax = trial.suggest_float(f"relax{i}", *RELAX)
            kept = {"order": step.order, "pred": step.pred, "axis": step.axis, "corr": step.corr}
            steps.append(StepStrategy(**kept, relax=(relax,) if step.order > 1 else ()))
        return space.schedule(gaps, tuple(steps))

    return suggest


def as_parameters(space: SearchSpace, schedule: SolverSchedule) -> dict[str, Any]:
    """The parameters of `everything` nearest to a schedule: how baselines are handed to Optuna's samplers first."""
    source = schedule.steps[0].eval.source
    gaps = space.gaps(schedule)
    logs = np.log(gaps / gaps.mean()).clip(*GAP)
    parameters: dict[str, Any] = {"source": source if source in ("model", *space.sources) else "model"}
    for i in range(space.nfe + 1):
        step = schedule.steps[min(i, len(schedule.steps) - 1)]
        pred = step.pred if isinstance(step.pred, str) and step.pred in (space.predictions or ()) else "mixed"
        free = step.relax[0] if step.relax and isinstance(step.relax[0], float) else 0.0
        parameters |= {
            f"gap{i}": float(logs[min(i, len(logs) - 1)]),
            f"order{i}": min(step.order, space.max_order),
            f"pred{i}": pred,
            f"mix{i}": float(np.clip(step.pred[0], 0, 1)) if isinstance(step.pred, tuple) else 0.5,
            f"relax{i}": float(np.clip(free, *RELAX)),
            f"corr{i}": step.corr is not None,
        }
    return parameters


def start_of(space: SearchSpace) -> dict[str, float]:
    """Where CMA-ES begins: the baseline itself."""
    base = space.adopt(recipe(STRUCTURE, space.noise_schedule, space.nfe))
    gaps = space.gaps(base)
    logs = np.log(gaps / math.exp(np.log(gaps).mean())).clip(*GAP)
    return {f"gap{i}": float(v) for i, v in enumerate(logs)} | {f"relax{i}": 0.0 for i in range(len(logs))}

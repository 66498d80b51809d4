"""Search: the solver schedule for a given model and number of network evaluations."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .converged import Teacher, teacher
    from .objective import PENALTY, MeanObjective, Objective
    from .predictor import Predictor
    from .space import SearchSpace
    from .starts import baselines, seeds
    from .strategies import STRATEGIES
    from .study import SearchResult, TrialRecord, run_search

__all__ = [
    "PENALTY",
    "STRATEGIES",
    "MeanObjective",
    "Objective",
    "Predictor",
    "SearchResult",
    "SearchSpace",
    "Teacher",
    "TrialRecord",
    "baselines",
    "run_search",
    "seeds",
    "teacher",
]

# Optuna and the networks are imported on first use: the command line lists its commands without waiting for them.
_HOMES = {
    "PENALTY": "objective",
    "STRATEGIES": "strategies",
    "MeanObjective": "objective",
    "Objective": "objective",
    "Predictor": "predictor",
    "SearchResult": "study",
    "SearchSpace": "space",
    "Teacher": "converged",
    "TrialRecord": "study",
    "baselines": "starts",
    "run_search": "study",
    "seeds": "starts",
    "teacher": "converged",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)

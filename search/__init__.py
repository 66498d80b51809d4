"""Search: the solver schedule for a given model and number of network evaluations."""

from .objective import PENALTY, MeanObjective, Objective
from .predictor import Predictor
from .seeds import baselines, seeds
from .space import SearchSpace
from .strategies import STRATEGIES
from .study import SearchResult, TrialRecord, run_search
from .teacher import Teacher, teacher

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

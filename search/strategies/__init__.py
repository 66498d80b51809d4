"""Ways to choose the next schedule, all behind Optuna's samplers."""

from .evolution import EvolutionProposer
from .parameters import as_parameters, everything, start_of, times_and_relaxations
from .proposals import SCHEDULE, Proposer, RandomProposer, ScheduleSampler, schedule_of, schedule_text
from .s3 import S3Proposer

STRATEGIES = ("s3", "evolution", "random", "tpe", "cmaes", "gp")

__all__ = [
    "SCHEDULE",
    "STRATEGIES",
    "EvolutionProposer",
    "Proposer",
    "RandomProposer",
    "S3Proposer",
    "ScheduleSampler",
    "as_parameters",
    "everything",
    "schedule_of",
    "schedule_text",
    "start_of",
    "times_and_relaxations",
]

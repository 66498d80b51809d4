"""Adapters to diffusers. Import this module before loading a pipeline that was saved with one of its schedulers."""

from diffusers import SchedulerMixin

from .discrete_scheduler import DiscreteSolverScheduler, DiscreteSolverSchedulerOutput
from .skips import SkipScaling, scaled_skips, skip_count
from .solver_scheduler import SolverScheduler, SolverSchedulerOutput
from .swapping import export, swap

__all__ = [
    "DiscreteSolverScheduler",
    "DiscreteSolverSchedulerOutput",
    "SchedulerMixin",
    "SkipScaling",
    "SolverScheduler",
    "SolverSchedulerOutput",
    "export",
    "scaled_skips",
    "skip_count",
    "swap",
]

# Saved pipelines name this module, whatever file the class lives in.
SolverScheduler.__module__ = __name__
DiscreteSolverScheduler.__module__ = __name__

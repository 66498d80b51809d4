"""Adapters to diffusers. Import this module before loading a pipeline that was saved with one of its schedulers."""

from diffusers import SchedulerMixin

from .solver_scheduler import SolverScheduler, SolverSchedulerOutput
from .swapping import swap

__all__ = ["SchedulerMixin", "SolverScheduler", "SolverSchedulerOutput", "swap"]

# Saved pipelines name this module, whatever file the class lives in.
SolverScheduler.__module__ = __name__

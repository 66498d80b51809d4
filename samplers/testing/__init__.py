"""What tests of samplers share, shipped so that other people's solvers can be held to the same: measured orders."""

from .orders import ExactFlow, GaussianFlow, history_times, local_errors, local_order, recipe_steps, slope
from .schedules import random_schedule

__all__ = [
    "ExactFlow",
    "GaussianFlow",
    "history_times",
    "local_errors",
    "local_order",
    "random_schedule",
    "recipe_steps",
    "slope",
]

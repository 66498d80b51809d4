"""What tests of samplers share, shipped so that other people's solvers can be held to the same: measured orders."""

from .orders import ExactFlow, GaussianFlow, history_times, local_errors, local_order, recipe_steps, slope

__all__ = ["ExactFlow", "GaussianFlow", "history_times", "local_errors", "local_order", "recipe_steps", "slope"]

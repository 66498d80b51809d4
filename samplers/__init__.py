"""fewstep's sampling core: strategy -> tableau -> run.

A `SolverSchedule` (plain data) is compiled to a `Tableau` (numbers) for a `NoiseSchedule` and run by one engine, natively with
`sample` or inside a diffusers pipeline with `samplers.schedulers.SolverScheduler`.
"""

from .engine import Engine, iterate, sample
from .noise import NoiseSchedule
from .recipes import RECIPES, parse_recipe, recipe
from .strategy import Corrector, Evaluation, Noise, Residual, SolverSchedule, StepStrategy, shipped_schedules
from .tableau import Tableau

__all__ = [
    "RECIPES",
    "Corrector",
    "Engine",
    "Evaluation",
    "Noise",
    "NoiseSchedule",
    "Residual",
    "SolverSchedule",
    "StepStrategy",
    "Tableau",
    "iterate",
    "parse_recipe",
    "recipe",
    "sample",
    "shipped_schedules",
]

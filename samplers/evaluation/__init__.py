"""Evaluation: models by name, comparisons at fixed NFE, pictures."""

from .compare import Comparison, compare, converged
from .models import Conditioning, MissingModelError, count_calls, generate, load_pipeline
from .pictures import comparison_figure, save_grid, save_image, schedule_figure

__all__ = [
    "Comparison",
    "Conditioning",
    "MissingModelError",
    "compare",
    "comparison_figure",
    "converged",
    "count_calls",
    "generate",
    "load_pipeline",
    "save_grid",
    "save_image",
    "schedule_figure",
]

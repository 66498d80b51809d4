"""Learned samplers for discrete diffusion: fit the numbers of a few-step sampler to a frozen model."""

from samplers.discrete import DiscreteTable

from .fit import FitSettings, fit_discrete_sampler
from .judge import exact_scores, floor_scores, reasons_against, sampled_scores
from .knobs import KnobSpace
from .score import ScoreFit, fit_score
from .target import Teacher, draw_many, model_digest, teacher_samples

__all__ = [
    "DiscreteTable",
    "FitSettings",
    "KnobSpace",
    "ScoreFit",
    "Teacher",
    "draw_many",
    "exact_scores",
    "fit_discrete_sampler",
    "fit_score",
    "floor_scores",
    "model_digest",
    "reasons_against",
    "sampled_scores",
    "teacher_samples",
]

"""Evaluation: models by name, comparisons at fixed NFE, features, distances and FID-like runs, pictures."""

from .compare import Comparison, compare, converged
from .features import (
    EXTRACTORS,
    FeatureExtractor,
    FeatureProtocol,
    PixelFeatures,
    RandomConvFeatures,
    load_extractor,
    quantise,
)
from .frechet import FrechetReference, frechet_distance, gaussian_wasserstein
from .kernels import gaussian_kernel_distance, kernel_distance, kernel_distance_subsets
from .models import Conditioning, MissingModelError, count_calls, generate, load_pipeline
from .moments import FeatureMoments
from .neighbours import PRDC, PrecisionRecall, prdc, precision_recall
from .pictures import comparison_figure, save_grid, save_image, schedule_figure
from .transport import energy_distance, sliced_wasserstein

__all__ = [
    "EXTRACTORS",
    "PRDC",
    "Comparison",
    "Conditioning",
    "FeatureExtractor",
    "FeatureMoments",
    "FeatureProtocol",
    "FrechetReference",
    "MissingModelError",
    "PixelFeatures",
    "PrecisionRecall",
    "RandomConvFeatures",
    "compare",
    "comparison_figure",
    "converged",
    "count_calls",
    "energy_distance",
    "frechet_distance",
    "gaussian_kernel_distance",
    "gaussian_wasserstein",
    "generate",
    "kernel_distance",
    "kernel_distance_subsets",
    "load_extractor",
    "load_pipeline",
    "prdc",
    "precision_recall",
    "quantise",
    "save_grid",
    "save_image",
    "schedule_figure",
    "sliced_wasserstein",
]

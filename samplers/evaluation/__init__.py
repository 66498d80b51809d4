"""Evaluation: models by name, comparisons at fixed NFE, features, distances and FID-like runs, pictures."""

from .compare import Comparison, compare, converged
from .extrapolation import Extrapolation, frechet_infinity
from .features import (
    EXTRACTORS,
    FeatureExtractor,
    FeatureProtocol,
    PixelFeatures,
    RandomConvFeatures,
    load_extractor,
    quantise,
)
from .fixed_nfe import FixedNfeRun, Model
from .floors import Floor, frechet_floor
from .frechet import FrechetReference, frechet_distance, gaussian_wasserstein
from .image_sources import ImageSource, open_images
from .kernels import gaussian_kernel_distance, kernel_distance, kernel_distance_subsets
from .model_inputs import ModelInputs, inputs_for
from .models import Conditioning, MissingModelError, count_calls, generate, load_pipeline
from .moments import FeatureMoments
from .neighbours import PRDC, PrecisionRecall, prdc, precision_recall
from .pictures import comparison_figure, save_grid, save_image
from .rarity import (
    RareSubsetReport,
    RarityScores,
    ScoreHistogram,
    average_knn_distance,
    local_outlier_factor,
    rare_subset,
    rare_subset_report,
    rarity_scores,
    score_histograms,
)
from .references import Reference, load_reference, reference_features
from .schedule_pictures import answer_weights, schedule_figure
from .transport import energy_distance, sliced_wasserstein

__all__ = [
    "EXTRACTORS",
    "PRDC",
    "Comparison",
    "Conditioning",
    "Extrapolation",
    "FeatureExtractor",
    "FeatureMoments",
    "FeatureProtocol",
    "FixedNfeRun",
    "Floor",
    "FrechetReference",
    "ImageSource",
    "MissingModelError",
    "Model",
    "ModelInputs",
    "PixelFeatures",
    "PrecisionRecall",
    "RandomConvFeatures",
    "RareSubsetReport",
    "RarityScores",
    "Reference",
    "ScoreHistogram",
    "answer_weights",
    "average_knn_distance",
    "compare",
    "comparison_figure",
    "converged",
    "count_calls",
    "energy_distance",
    "frechet_distance",
    "frechet_floor",
    "frechet_infinity",
    "gaussian_kernel_distance",
    "gaussian_wasserstein",
    "generate",
    "inputs_for",
    "kernel_distance",
    "kernel_distance_subsets",
    "load_extractor",
    "load_pipeline",
    "load_reference",
    "local_outlier_factor",
    "open_images",
    "prdc",
    "precision_recall",
    "quantise",
    "rare_subset",
    "rare_subset_report",
    "rarity_scores",
    "reference_features",
    "save_grid",
    "save_image",
    "schedule_figure",
    "score_histograms",
    "sliced_wasserstein",
]

"""Minority guidance: find what is rare in the data, and steer any sampler or pipeline towards it.

Score (`MinorityScorer`), bin (`equal_count_bins`), train a noisy classifier (`MinorityClassifier`, `fit`), guide
(`minority_guidance`, natively `guided_denoiser`). Without data or training: `self_minority_guidance`, `boost_and_skip`.
"""

from .bins import bins_within, equal_count_bins, split_rarest
from .boosting import boost_gain, level_of_gain, model_top_variance
from .classifier import MinorityClassifier
from .distances import absolute_error, feature_distance, lpips, squared_error
from .examples import alike, marked_kinds
from .features import NetworkFeatures, Whitening
from .fitting import FitReport, FitSettings, fit
from .hooks import GuidanceRun
from .kinds import kind_shares, missing_kinds
from .levels import alpha_bar_of_snr, time_of_alpha_bar, top_eigenvalue
from .minority import minority_guidance, self_minority_guidance
from .patches import PatchFeatures
from .prompts import PromptSettings, minority_prompt
from .scorer import MinorityScorer
from .scoring import read_scores, score_dataset
from .shifts import Window, check_guidance, class_gradient, guided_denoiser, label_mask, score_to_x0
from .skipping import BoostRun, boost_and_skip

__all__ = [
    "BoostRun",
    "FitReport",
    "FitSettings",
    "GuidanceRun",
    "MinorityClassifier",
    "MinorityScorer",
    "NetworkFeatures",
    "PatchFeatures",
    "PromptSettings",
    "Whitening",
    "Window",
    "absolute_error",
    "alike",
    "alpha_bar_of_snr",
    "bins_within",
    "boost_and_skip",
    "boost_gain",
    "check_guidance",
    "class_gradient",
    "equal_count_bins",
    "feature_distance",
    "fit",
    "guided_denoiser",
    "kind_shares",
    "label_mask",
    "level_of_gain",
    "lpips",
    "marked_kinds",
    "minority_guidance",
    "minority_prompt",
    "missing_kinds",
    "model_top_variance",
    "read_scores",
    "score_dataset",
    "score_to_x0",
    "self_minority_guidance",
    "split_rarest",
    "squared_error",
    "time_of_alpha_bar",
    "top_eigenvalue",
]

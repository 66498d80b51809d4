"""Feature extractors, each with a protocol id."""

from .loading import EXTRACTORS, load_extractor
from .protocol import FeatureExtractor, FeatureProtocol, quantise
from .shipped import PixelFeatures, RandomConvFeatures

__all__ = [
    "EXTRACTORS",
    "FeatureExtractor",
    "FeatureProtocol",
    "PixelFeatures",
    "RandomConvFeatures",
    "load_extractor",
    "quantise",
]

"""Particles: sequential Monte Carlo along diffusion paths, for samples from the law that was asked for."""

from .cloud import Cloud, Trace
from .feynman_kac import FeynmanKac
from .report import trace_figure, trace_page
from .resampling import SCHEMES, resample
from .targets import Reward, Target

__all__ = ["SCHEMES", "Cloud", "FeynmanKac", "Reward", "Target", "Trace", "resample", "trace_figure", "trace_page"]

"""Denoisers: callables ``(x, t) -> x0`` for the engine. Exact ones for known laws, and wrappers around networks."""

from .exact import EmpiricalDataset, GaussianMixture
from .network import from_epsilon, from_network

__all__ = ["EmpiricalDataset", "GaussianMixture", "from_epsilon", "from_network"]

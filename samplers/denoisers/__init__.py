"""Denoisers: callables ``(x, t) -> x0`` for the engine. Exact ones for known laws, and wrappers around networks."""

from typing import TYPE_CHECKING, Any

from .exact import EmpiricalDataset, GaussianMixture
from .network import from_epsilon, from_network, network_of

if TYPE_CHECKING:
    from .pipeline import from_pipeline

__all__ = ["EmpiricalDataset", "GaussianMixture", "from_epsilon", "from_network", "from_pipeline", "network_of"]


def __getattr__(name: str) -> Any:
    # diffusers takes seconds to import, which the exact denoisers need not wait for.
    if name == "from_pipeline":
        from .pipeline import from_pipeline

        return from_pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

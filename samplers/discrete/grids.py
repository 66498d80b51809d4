"""Time grids of discrete samplers: M + 1 times from 1 to 0."""

from __future__ import annotations

import math


def uniform_grid(steps: int) -> list[float]:
    """Equal steps."""
    return [1.0 - k / steps for k in range(steps + 1)]


def cosine_grid(steps: int) -> list[float]:
    """The mask ratio cos(pi r / 2) at equal steps of progress r (Chang et al. 2022, arXiv:2202.04200)."""
    return [math.cos(0.5 * math.pi * k / steps) for k in range(steps)] + [0.0]


def quadratic_grid(steps: int) -> list[float]:
    """Equal steps of the square root of t: fine towards the data."""
    return [(1.0 - k / steps) ** 2 for k in range(steps + 1)]


GRIDS = {"uniform": uniform_grid, "cosine": cosine_grid, "quadratic": quadratic_grid}


def time_grid(name: str, steps: int) -> list[float]:
    """A named grid.

    Raises:
        ValueError: unknown name, or fewer than one step.
    """
    if name not in GRIDS:
        raise ValueError(f"unknown discrete time grid {name!r}; known: {', '.join(GRIDS)}")
    if steps < 1:
        raise ValueError(f"a grid needs at least one step, got {steps}")
    return GRIDS[name](steps)

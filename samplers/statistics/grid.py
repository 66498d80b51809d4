"""The nodes of model statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from ..noise import NoiseSchedule

LAM_FLOOR = -7.0  # where grids begin if the noise schedule begins at alpha = 0


def node_grid(noise_schedule: NoiseSchedule, nodes: int, t_start: float | None, t_end: float | None) -> Tensor:
    """(nodes + 1,) lambda, even, from ``t_start`` (t_max, or where alpha becomes positive) to ``t_end`` (t_min).

    Raises:
        ValueError: fewer than two nodes, or times that do not enclose a finite interval.
    """
    first = noise_schedule.lam(noise_schedule.t_max if t_start is None else t_start).item()
    last = noise_schedule.lam(noise_schedule.t_min if t_end is None else t_end).item()
    if t_start is None:
        first = max(first, LAM_FLOOR)
    if nodes < 1 or not -float("inf") < first < last < float("inf"):
        raise ValueError(f"t_start and t_end must enclose finite lambda, got {nodes + 1} nodes from {first:g} to {last:g}")
    return torch.linspace(first, last, nodes + 1, dtype=torch.float64)

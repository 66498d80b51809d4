"""Processing of the x0-prediction that scheduler configs ask for: sample clipping and dynamic thresholding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor


def dynamic_threshold(x0: Tensor, ratio: float, max_value: float) -> Tensor:
    """Clamp every sample to a quantile of its absolute values and rescale (Saharia et al. 2022, arXiv:2205.11487, 2.3).

    Args:
        x0: (B, *E).
        ratio: the quantile, in (0, 1).
        max_value: upper bound of the threshold; the lower one is 1.
    """
    if x0.numel() == 0:
        return x0
    bound = torch.quantile(x0.abs().reshape(len(x0), -1).float(), ratio, dim=1).clamp(1.0, max_value).to(x0.dtype)
    bound = bound.reshape(-1, *[1] * (x0.ndim - 1))
    return x0.clamp(-bound, bound) / bound


def _clamp(x0: Tensor, bound: float) -> Tensor:
    return x0.clamp(-bound, bound)


def clip_from_config(config: Mapping[str, Any], honours: tuple[str, ...]) -> Callable[[Tensor], Tensor] | None:
    """The processing that ``config`` asks for, of the kinds that the recipe honours; None when there is none."""
    if "thresholding" in honours and config.get("thresholding"):
        ratio, top = float(config["dynamic_thresholding_ratio"]), float(config["sample_max_value"])
        return partial(dynamic_threshold, ratio=ratio, max_value=top)
    if "clip_sample" in honours and config.get("clip_sample"):
        return partial(_clamp, bound=float(config.get("clip_sample_range") or 1.0))
    return None

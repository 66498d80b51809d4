"""What a step returns."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers.utils import BaseOutput
from torch import Tensor


@dataclass
class SolverSchedulerOutput(BaseOutput):
    """Result of one step.

    Attributes:
        prev_sample: (B, *E) the state to evaluate the network at next; the sample after the last step.
        pred_original_sample: (B, *E) the x0-prediction of this step, before clipping.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor

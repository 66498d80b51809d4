"""Layer 2: what the numbers say. A solver schedule compiled to weighted sums over states and x0-predictions.

Coefficients are Python floats, or 0-d float64 tensors where the schedule's times or coefficients are tensors: the same
arithmetic then is differentiable. `samplers.compiler` has the formulas.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor

from .compiler import Compiler
from .noise import NoiseSchedule
from .rows import Query, Row, Stage
from .strategy import SolverSchedule

__all__ = ["Query", "Row", "Stage", "Tableau"]

CACHE_SIZE = 64


@dataclass(frozen=True)
class Tableau:
    """A compiled schedule.

    Attributes:
        opening: rows before the first query (an analytic first step), affine in the starting noise.
        stages: queries in order, each with the rows that follow it.
        result: name of the final state.
        clip: as in `SolverSchedule`.
        first_x0: (*E) the data's mean, where an analytic first step uses it.
    """

    opening: tuple[Row, ...]
    stages: tuple[Stage, ...]
    result: str
    clip: float | str | None
    first_x0: Tensor | None = None

    @property
    def nfe(self) -> int:
        """Network evaluations."""
        return len(self.stages)

    @staticmethod
    def build(
        schedule: SolverSchedule,
        noise_schedule: NoiseSchedule,
        *,
        first_x0: Tensor | None = None,
        statistics: None = None,
    ) -> Tableau:
        """Compile ``schedule`` for ``noise_schedule``; the last few results are cached by digest.

        Args:
            schedule: times in the noise schedule's t; tensors make the coefficients differentiable.
            noise_schedule: gives alpha, sigma and lambda of every time.
            first_x0: (*E) mean image, needed by and only by an "average_x0" first step.
            statistics: empirical model statistics; no strategy of this version takes them.

        Raises:
            ValueError: the schedule belongs to another family, a time is out of range, ``first_x0`` is missing, or a step
                cannot be placed where it is (naming the step and the reason).
        """
        if statistics is not None:
            raise ValueError("this schedule has no step that uses empirical model statistics")
        source = schedule.steps[0].eval.source
        if source == "average_x0" and first_x0 is None:
            raise ValueError("steps[0]: source 'average_x0' needs first_x0, the data's mean")
        kind = str((schedule.path or {}).get("type", noise_schedule.kind))
        if kind.split("_")[0] != noise_schedule.family:
            raise ValueError(f"the schedule's times belong to {kind!r}, not to the {noise_schedule.kind!r} noise schedule")
        if noise_schedule.family != "flow" and any(step.pred == "flow" for step in schedule.steps):
            raise ValueError(f"pred 'flow' needs a flow model; this noise schedule is {noise_schedule.kind}")
        symbolic = any(torch.is_tensor(t) for t in schedule.times)
        try:
            key = None if symbolic else (schedule.digest, id(noise_schedule))
        except TypeError:  # tensors among the coefficients
            key = None
        if key is None or key not in _cache:
            compiled = Compiler(schedule, noise_schedule).run()
            if key is not None:
                _cache[key] = (noise_schedule, compiled)
                while len(_cache) > CACHE_SIZE:
                    _cache.popitem(last=False)
        else:
            compiled = _cache[key][1]
        opening, stages = compiled
        return Tableau(opening, stages, f"x{len(schedule.steps)}", schedule.clip, first_x0)


_Compiled = tuple[tuple[Row, ...], tuple[Stage, ...]]
# The noise schedule is kept beside the result so that its id stays taken.
_cache: OrderedDict[tuple[str, int], tuple[NoiseSchedule, _Compiled]] = OrderedDict()

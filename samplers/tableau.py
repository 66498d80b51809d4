"""Layer 2: what the numbers say. A solver schedule compiled to weighted sums over states and x0-predictions.

Coefficients are Python floats, or 0-d float64 tensors where the schedule's times or coefficients are tensors: the same
arithmetic then is differentiable. `samplers.compiler` has the formulas.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .compiler import Compiler
from .noise import NoiseSchedule
from .program import Program, program
from .rows import Query, Row, Stage
from .statistics import EmpiricalStatistics
from .statistics.reading import Reader
from .step import STATISTICAL
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
        statistics_shape: shape of the coefficients that come from empirical model statistics, None without such steps.
        plain: what the engine walks.
        uniform: what it walks under `torch.compile`.
    """

    opening: tuple[Row, ...]
    stages: tuple[Stage, ...]
    result: str
    clip: float | str | None
    first_x0: Tensor | None = None
    statistics_shape: torch.Size | None = None
    plain: Program = field(repr=False, kw_only=True)
    uniform: Program = field(repr=False, kw_only=True)

    @property
    def nfe(self) -> int:
        """Network evaluations."""
        return len(self.stages)

    def like(self, x: Tensor) -> Tableau:
        """For states like ``x`` (B, *E): coefficients that have a shape get x's dtype and place.

        Raises:
            ValueError: they do not broadcast to a sample's shape.
        """
        shape, sample = self.statistics_shape or torch.Size(), x.shape[1:]
        if not shape:
            return self
        if len(shape) > len(sample) or any(a not in (1, b) for a, b in zip(shape[::-1], sample[::-1], strict=False)):
            raise ValueError(
                f"the statistics have shape {tuple(shape)}, which does not broadcast to the state's {tuple(sample)}"
            )
        opening = tuple(row.like(x) for row in self.opening)
        stages = tuple(replace(stage, rows=tuple(row.like(x) for row in stage.rows)) for stage in self.stages)
        plain = program(opening, stages, self.result, self.plain.given)
        return replace(self, opening=opening, stages=stages, plain=plain, uniform=plain)

    @property
    def depth(self) -> int:
        """Network evaluations in a row: those that do not wait for one another (EPD's midpoints) count once."""
        needs: dict[str, int] = {}  # name -> evaluations that must be done before it is known
        rows = iter(self.opening)
        deepest = 0
        for stage in (None, *self.stages):
            if stage is not None:
                rows = iter(stage.rows)
                done = needs.get(stage.query.state, 0) + 1
                needs[stage.query.output] = done
                if stage.raw is not None:
                    needs[stage.raw] = done
                deepest = max(deepest, done)
            for row in rows:
                needs[row.target] = max((needs.get(name, 0) for name, _ in row.terms), default=0)
        return deepest

    @staticmethod
    def build(
        schedule: SolverSchedule,
        noise_schedule: NoiseSchedule,
        *,
        first_x0: Tensor | None = None,
        statistics: EmpiricalStatistics | None = None,
    ) -> Tableau:
        """Compile ``schedule`` for ``noise_schedule``; the last few results are cached by digest.

        Args:
            schedule: times in the noise schedule's t; tensors make the coefficients differentiable.
            noise_schedule: gives alpha, sigma and lambda of every time.
            first_x0: (*E) mean image, needed by and only by an "average_x0" first step.
            statistics: empirical model statistics, needed by steps with pred "v3" or "v3-nodes" unless the schedule has its
                own, and ignored without such steps.

        Raises:
            ValueError: the schedule belongs to another family, a time is out of range, ``first_x0`` or ``statistics``
                are missing, or a step cannot be placed where it is (naming the step and the reason).
        """
        statistical = [i for i, step in enumerate(schedule.steps) if step.pred in STATISTICAL]
        statistics = EmpiricalStatistics.of(schedule) if statistics is None else statistics
        if statistical and statistics is None:
            pred = schedule.steps[statistical[0]].pred
            raise ValueError(
                f"steps[{statistical[0]}]: pred {pred!r} needs the model's empirical statistics: pass "
                "statistics=EmpiricalStatistics.load(path), or make them with EmpiricalStatistics.estimate"
            )
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
            key = None if symbolic or statistical else (schedule.digest, id(noise_schedule))
        except TypeError:  # tensors among the coefficients
            key = None
        if key is None or key not in _cache:
            reader = Reader(statistics) if statistical and statistics is not None else None
            given = ("x0", *(["first_x0"] if source == "average_x0" else []), *(["one"] if statistical else []))
            compiled = _lower(*Compiler(schedule, noise_schedule, reader).run(), f"x{len(schedule.steps)}", given)
            if key is not None:
                _cache[key] = (noise_schedule, compiled)
                while len(_cache) > CACHE_SIZE:
                    _cache.popitem(last=False)
        else:
            compiled = _cache[key][1]
        shape = statistics.shape if statistical and statistics is not None else None
        return replace(compiled, clip=schedule.clip, first_x0=first_x0, statistics_shape=shape)


def _lower(opening: tuple[Row, ...], stages: tuple[Stage, ...], result: str, given: tuple[str, ...]) -> Tableau:
    plain, uniform = (program(opening, stages, result, given, uniform=form) for form in (False, True))
    return Tableau(opening, stages, result, None, plain=plain, uniform=uniform)


# The noise schedule is kept beside the result so that its id stays taken.
_cache: OrderedDict[tuple[str, int], tuple[NoiseSchedule, Tableau]] = OrderedDict()

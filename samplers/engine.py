"""Layer 3: what the machine does. Walks a tableau by ask/tell, so the native loop and a diffusers scheduler share it.

The whole protocol: ``while engine.query is not None: engine.tell(denoiser(engine.x, engine.query.t))``, then ``engine.x``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from .noise import NoiseSchedule
from .parametrization import weighted_sum
from .statistics import EmpiricalStatistics
from .strategy import SolverSchedule
from .tableau import Query, Row, Tableau

Denoiser = Callable[[Tensor, Tensor], Tensor]
NoiseSource = Callable[[Tensor], Tensor]  # standard normal draws in the shape, dtype and place of its argument


class Engine:
    """One run of a tableau over a batch.

    Attributes:
        tableau: the compiled schedule.
        position: queries answered so far.
        memory: named (B, *E) tensors: states and x0-predictions that later rows still need.
    """

    def __init__(self, tableau: Tableau, x: Tensor, clip: Callable[[Tensor], Tensor] | None = None) -> None:
        """Start at the noise ``x`` (B, *E) in the arithmetic's dtype; ``clip`` processes every x0-prediction."""
        self.tableau, self.position, self.clip = tableau.like(x), 0, clip
        if clip is None and isinstance(tableau.clip, float):
            self.clip = partial(_clamp, bound=tableau.clip)
        self.memory = {"x0": x}
        if tableau.first_x0 is not None:
            if tableau.first_x0.shape != x.shape[1:]:
                raise ValueError(f"first_x0 has shape {tuple(tableau.first_x0.shape)}, the state {tuple(x.shape[1:])}")
            self.memory["first_x0"] = tableau.first_x0.to(x).expand_as(x)
        if tableau.statistics_shape is not None:
            self.memory["one"] = x.new_ones(()).expand_as(x)
        self._apply(self.tableau.opening)

    @property
    def query(self) -> Query | None:
        """The network evaluation that is due, or None at the end."""
        stages = self.tableau.stages
        return stages[self.position].query if self.position < len(stages) else None

    @property
    def x(self) -> Tensor:
        """The state (B, *E) to evaluate the network at; the result at the end."""
        query = self.query
        return self.memory[self.tableau.result if query is None else query.state]

    def tell(self, x0: Tensor, x: Tensor | None = None, noise: NoiseSource = torch.randn_like) -> None:
        """Take the network's x0-prediction (B, *E) for the due query and move on to the next.

        Args:
            x0: the prediction, before clipping.
            x: the state it was made at, where the caller may have changed it since it was handed out.
            noise: where stochastic steps draw from.

        Raises:
            RuntimeError: no query is due.
            ValueError: ``x0`` has another shape than the state.
        """
        if self.position >= len(self.tableau.stages):
            raise RuntimeError(f"all {len(self.tableau.stages)} network evaluations are done; start a new run")
        stage, memory = self.tableau.stages[self.position], self.memory
        if x is not None:
            memory[stage.query.state] = x
        if x0.shape != memory[stage.query.state].shape:
            wanted = tuple(memory[stage.query.state].shape)
            raise ValueError(f"the denoiser returned shape {tuple(x0.shape)} for a state of shape {wanted}")
        if stage.raw is not None:
            memory[stage.raw] = x0
        memory[stage.query.output] = x0 if self.clip is None else self.clip(x0)
        self._apply(stage.rows, noise)
        for name in [name for name in memory if name not in stage.keep]:
            del memory[name]
        self.position += 1

    def select(self, index: Tensor) -> None:
        """Permute or duplicate samples: everything remembered follows ``index`` (B',) along the batch."""
        self.memory = {name: value[index] for name, value in self.memory.items()}

    def _apply(self, rows: tuple[Row, ...], noise: NoiseSource = torch.randn_like) -> None:
        memory = self.memory
        for row in rows:
            terms = [(c, memory[name]) for name, c in row.terms]
            if torch.is_tensor(row.noise) or row.noise != 0.0:
                terms.append((row.noise, noise(terms[0][1])))
            memory[row.target] = weighted_sum(terms)


def _clamp(x0: Tensor, bound: float) -> Tensor:
    return x0.clamp(-bound, bound)


def iterate(
    denoiser: Denoiser,
    x: Tensor,
    schedule: SolverSchedule | Tableau,
    noise_schedule: NoiseSchedule,
    *,
    generator: torch.Generator | None = None,
    first_x0: Tensor | None = None,
    statistics: EmpiricalStatistics | None = None,
) -> Iterator[Engine]:
    """Run a schedule, yielding the engine before the first query and after every answer.

    Arguments as in `sample`. Between two items the engine's memory may be inspected or permuted with `Engine.select`.
    """
    if not torch.is_tensor(x) or not x.is_floating_point():
        kind = x.dtype if torch.is_tensor(x) else type(x).__name__
        raise ValueError(f"x must be a floating-point tensor of shape (batch, ...), got {kind}")
    if x.ndim < 1:
        raise ValueError("x must have a batch dimension, got a 0-d tensor")
    if isinstance(schedule, Tableau):
        tableau = schedule
    else:
        tableau = Tableau.build(schedule, noise_schedule, first_x0=first_x0, statistics=statistics)
    engine = Engine(tableau, x.to(torch.promote_types(x.dtype, torch.float32)))

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)

    yield engine
    while (query := engine.query) is not None:
        engine.tell(denoiser(engine.x, query.t), noise=noise)
        yield engine


def sample(
    denoiser: Denoiser,
    x: Tensor,
    schedule: SolverSchedule | Tableau,
    noise_schedule: NoiseSchedule,
    *,
    generator: torch.Generator | None = None,
    trajectory: bool = False,
    first_x0: Tensor | None = None,
    statistics: EmpiricalStatistics | None = None,
) -> Tensor | tuple[Tensor, list[Tensor]]:
    """Sample: integrate from the noise ``x`` with the given solver schedule.

    Args:
        denoiser: ``denoiser(x, t) -> x0`` with x (B, *E) and t a 0-d float64 tensor in the noise schedule's time.
        x: (B, *E) the state at the schedule's first time. Arithmetic runs in its dtype, at least float32.
        schedule: a `SolverSchedule`, or a `Tableau` compiled before.
        noise_schedule: the denoiser's.
        generator: source of the noise that stochastic steps draw.
        trajectory: also return the predicted (uncorrected) state at every time of the schedule, first ``x`` itself.
        first_x0: (*E) mean image for an "average_x0" first step.
        statistics: empirical model statistics, for the steps that use them.

    Returns:
        (B, *E) in x's dtype; with ``trajectory`` also a list of such tensors, one per time.

    Raises:
        ValueError: see `Tableau.build`; also an ``x`` that is no floating-point batch, before any network call.
    """
    states: dict[str, Tensor] = {}
    for engine in iterate(denoiser, x, schedule, noise_schedule, generator=generator, first_x0=first_x0, statistics=statistics):
        if trajectory:
            states |= {name: value for name, value in engine.memory.items() if name.startswith("x")}
    result = engine.x.to(x.dtype)
    if not trajectory:
        return result
    ordered = sorted(states, key=lambda name: int(name[1:]))
    return result, [states[name].to(x.dtype) for name in ordered]

"""Layer 3: what the machine does. Walks a tableau by ask/tell, so the native loop and a diffusers scheduler share it.

The whole protocol: ``while engine.query is not None: engine.tell(denoiser(engine.x, engine.query.t))``, then ``engine.x``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .noise import NoiseSchedule
from .parametrization import Scalar, weighted_sum
from .program import Move, Sum
from .statistics import EmpiricalStatistics
from .strategy import SolverSchedule
from .tableau import Query, Tableau

Denoiser = Callable[[Tensor, Tensor], Tensor]
NoiseSource = Callable[[Tensor], Tensor]  # standard normal draws in the shape, dtype and place of its argument


class Engine:
    """One run of a tableau over a batch.

    Attributes:
        tableau: the compiled schedule.
    """

    def __init__(self, tableau: Tableau, x: Tensor, clip: Callable[[Tensor], Tensor] | None = None) -> None:
        """Start at the noise ``x`` (B, *E) in the arithmetic's dtype; ``clip`` processes every x0-prediction."""
        self.tableau, self.clip = tableau.like(x), clip
        if clip is None and isinstance(tableau.clip, float):
            self.clip = partial(_clamp, bound=tableau.clip)
        self._program = self.tableau.uniform if torch.compiler.is_compiling() else self.tableau.plain
        self._move: Move = self._program.moves[0]
        self._slots = [self._given(name, x) for name in self._program.given]
        for row in self._program.opening:
            self._slots.append(_add_up(row, self._slots))
        self._slots += [x] * (len(self._move.names) - len(self._slots))  # where the uniform form misses history

    def _given(self, name: str, x: Tensor) -> Tensor:
        if name == "one":
            return x.new_ones(()).expand_as(x)
        mean = self.tableau.first_x0
        if name == "x0" or mean is None:
            return x
        if mean.shape != x.shape[1:]:
            raise ValueError(f"first_x0 has shape {tuple(mean.shape)}, the state {tuple(x.shape[1:])}")
        return mean.to(x).expand_as(x)

    @property
    def position(self) -> int:
        """Queries answered so far."""
        return self._move.index

    @property
    def query(self) -> Query | None:
        """The network evaluation that is due, or None at the end."""
        return self._move.query

    @property
    def levels(self) -> tuple[Scalar, Scalar]:
        """alpha and sigma of the evaluation that is due; tensors under `torch.compile`.

        Raises:
            RuntimeError: none is due.
        """
        if self._move.levels is not None:
            return self._move.levels[0], self._move.levels[1]
        query = self._due()
        return query.alpha, query.sigma

    @property
    def x(self) -> Tensor:
        """The state (B, *E) to evaluate the network at; the result at the end."""
        return self._slots[self._move.state]

    @property
    def memory(self) -> dict[str, Tensor]:
        """What later rows still need, by name: (B, *E) states x0, x1, ... and x0-predictions d0, d1, ..."""
        return {name: value for name, value in zip(self._move.names, self._slots, strict=True) if name}

    def _due(self) -> Query:
        if self._move.query is None:
            raise RuntimeError(f"all {self._move.index} network evaluations are done; start a new run")
        return self._move.query

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
        self._due()
        move, slots = self._move, self._slots
        if x is not None:
            slots[move.state] = x
        if x0.shape != slots[move.state].shape:
            wanted = tuple(slots[move.state].shape)
            raise ValueError(f"the denoiser returned shape {tuple(x0.shape)} for a state of shape {wanted}")
        if move.raw:
            slots.append(x0)
        slots.append(x0 if self.clip is None else self.clip(x0))
        for row in move.rows:
            slots.append(_add_up(row, slots, noise))
        assert move.next is not None
        self._slots, self._move = [slots[k] for k in move.keep], move.next

    def select(self, index: Tensor) -> None:
        """Permute or duplicate samples: everything remembered follows ``index`` (B',) along the batch."""
        self._slots = [value[index] for value in self._slots]

    def branch(self, tableau: Tableau) -> Engine:
        """A copy of this run that goes on with ``tableau``, as if it had made all steps so far itself.

        Raises:
            ValueError: the other tableau remembers other states or x0-predictions at this point.
        """
        other = copy(self)
        other.tableau, other._slots = tableau.like(self.x), list(self._slots)
        other._program = other.tableau.plain
        other._move = other._program.moves[self._move.index]
        if other._move.names != self._move.names:
            raise ValueError(f"the run remembers {self._move.names}, the tableau would need {other._move.names}")
        return other

    def __getstate__(self) -> dict[str, Any]:
        """The move by its number: moves are tied to one another."""
        return {**self.__dict__, "_move": self._move.index}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Find the move again."""
        self.__dict__.update(state)
        self._move = self._program.moves[state["_move"]]


def _add_up(row: Sum, slots: list[Tensor], noise: NoiseSource = torch.randn_like) -> Tensor:
    weights = row.weights if row.dense is None else row.dense
    terms = [(weights[i], slots[slot]) for i, slot in enumerate(row.slots)]
    if torch.is_tensor(row.noise) or row.noise != 0.0:
        terms.append((row.noise, noise(terms[0][1])))
    return weighted_sum(terms)


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

r"""Raw tableaus: a solver given by its numbers alone becomes a solver schedule with residuals.

Every learned solver is $x_{i+1} = \sum_j a_{ij} x_j + \sum_j b_{ij} D_j$, with $D_j$ the x0-prediction at $x_j$. Most are
published in the frame $y = x / \alpha$, $s = \sigma / \alpha$ (EDM's), where $(y_j - D_j) / s_j$ is the slope.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch

from ..noise import NoiseSchedule
from ..strategy import Evaluation, Noise, Residual, SolverSchedule, StepStrategy
from ..tableau import Tableau


@dataclass
class Row:
    """Coefficients of one step by node.

    Attributes:
        x: of the predicted states.
        x0: of the x0-predictions.
    """

    x: dict[int, float] = field(default_factory=dict)
    x0: dict[int, float] = field(default_factory=dict)

    def add(self, scale: float, other: Row) -> Row:
        """``self + scale * other``, in place; returns itself."""
        for mine, theirs in ((self.x, other.x), (self.x0, other.x0)):
            for node, value in theirs.items():
                mine[node] = mine.get(node, 0.0) + scale * value
        return self

    @classmethod
    def state(cls, node: int) -> Row:
        """The state at a node."""
        return cls(x={node: 1.0})

    @classmethod
    def prediction(cls, node: int) -> Row:
        """The x0-prediction at a node."""
        return cls(x0={node: 1.0})

    @classmethod
    def slope(cls, node: int, level: float) -> Row:
        """(y - D) / s at a node with s = ``level``."""
        return cls(x={node: 1.0 / level}, x0={node: -1.0 / level})

    def from_frame(self, alphas: Sequence[float], end: int) -> Row:
        """A row of the frame x / alpha, as coefficients of x; ``end`` is the node it computes."""
        return Row(
            {j: a * alphas[end] / alphas[j] for j, a in self.x.items()}, {j: b * alphas[end] for j, b in self.x0.items()}
        )


def from_rows(
    times: Sequence[float],
    rows: Sequence[Row | None],
    noise_schedule: NoiseSchedule,
    *,
    evaluations: Mapping[int, Evaluation] | None = None,
    noise: Mapping[int, Noise] | None = None,
    name: str = "",
    provenance: Mapping[str, Any] | None = None,
) -> SolverSchedule:
    """The schedule whose compiled rows are the given ones.

    Args:
        times: one more than rows.
        rows: coefficients of x; None adds noise up to a noisier time.
        noise_schedule: where the times lie.
        evaluations: of the nodes that are not plain.
        noise: of the steps that add noise.
        name: for people.
        provenance: where the numbers come from.

    Raises:
        ValueError: a row names a node that does not exist yet or has no prediction, or the times are not valid.
    """
    evaluations, noise = dict(evaluations or {}), dict(noise or {})
    if len(times) != len(rows) + 1:
        raise ValueError(f"{len(rows)} rows need {len(rows) + 1} times, got {len(times)}")
    for i, target in enumerate(rows):
        if target is None:
            evaluations[i] = Evaluation(source="none")
    plain = tuple(StepStrategy(eval=evaluations.get(i, Evaluation()), noise=noise.get(i)) for i in range(len(rows)))
    path = {"type": noise_schedule.kind, **noise_schedule.parameters}
    base = SolverSchedule(times=tuple(times), steps=plain, name=name, path=path, provenance=dict(provenance or {}))
    compiled = _compiled_rows(base, noise_schedule)
    steps = []
    for i, (step, target) in enumerate(zip(plain, rows, strict=True)):
        if target is None:
            steps.append(step)
            continue
        _check_nodes(i, target, plain)
        change = Row(dict(target.x), dict(target.x0)).add(-1.0, compiled[i])
        delta = Residual(x=_dense(change.x), x0=_dense(change.x0))
        steps.append(StepStrategy(eval=step.eval, noise=step.noise, delta=delta))
    return msgspec.structs.replace(base, steps=tuple(steps))


def compiled_rows(schedule: SolverSchedule, noise_schedule: NoiseSchedule) -> list[Row]:
    """What a schedule without correctors and re-evaluations compiles to, one row a step.

    Raises:
        ValueError: it has a corrector, whose states are not nodes of their own.
    """
    if any(step.corr is not None for step in schedule.steps):
        raise ValueError("a schedule with correctors is not one row a step")
    return _compiled_rows(schedule, noise_schedule)


def _compiled_rows(schedule: SolverSchedule, noise_schedule: NoiseSchedule) -> list[Row]:
    mean = torch.zeros(1) if schedule.steps[0].eval.source == "average_x0" else None
    tableau = Tableau.build(schedule, noise_schedule, first_x0=mean)
    rows = [Row() for _ in schedule.steps]
    for compiled in (*tableau.opening, *(row for stage in tableau.stages for row in stage.rows)):
        row = rows[int(compiled.target[1:]) - 1]
        for name, value in compiled.terms:
            if name == "first_x0":
                row.x0[0] = float(value)
            else:
                (row.x if name[0] == "x" else row.x0)[int(name[1:])] = float(value)
    return rows


def _check_nodes(i: int, row: Row, steps: Sequence[StepStrategy]) -> None:
    for node in (*row.x, *row.x0):
        if not 0 <= node <= i:
            raise ValueError(f"row {i} names node {node}; the nodes before it are 0..{i}")
    for node, value in row.x0.items():
        if value and steps[node].eval.source not in ("model", "average_x0"):
            raise ValueError(f"row {i} uses the prediction at node {node}, where the network is not evaluated")


def _dense(coefficients: Mapping[int, float]) -> tuple[float, ...]:
    used = [node for node, value in coefficients.items() if value]
    return tuple(coefficients.get(node, 0.0) for node in range(max(used) + 1)) if used else ()

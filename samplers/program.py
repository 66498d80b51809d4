"""A tableau with slots instead of names: what the engine walks, one `Move` per network evaluation.

Names cost a look-up, and tell a compiler that every step is different. Slots do not: a state, then history from the latest on.
Two forms of the same tableau. The plain one keeps what later rows read and nothing else. The uniform one, for `torch.compile`,
gives all steps of a kind the same slots and dense coefficients in a tensor, so that one graph serves them all; where history is
still missing it multiplies the state by zero.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .parametrization import Scalar
from .rows import Query, Row, Stage

Slots = tuple[int, ...]
MISSING = -1


@dataclass(eq=False)
class Sum:
    """One row: the slots it reads and their coefficients."""

    slots: Slots
    weights: tuple[Scalar, ...]
    noise: Scalar
    dense: Tensor | None = None  # (len(slots),) float64, in the uniform form


@dataclass(eq=False)
class Move:
    """A query and what follows it.

    Memory before it is a list of states and x0-predictions. The answer is appended (the raw one before it, where a row needs
    that), then each row's sum; ``keep`` says which slots the next move finds, in order.

    Attributes:
        query: the evaluation that is due; None at the end.
        state: slot of the state to evaluate at; of the result at the end.
        names: of the slots before the answer; the empty string where history is still missing.
        raw: whether the answer before clipping is kept too.
        rows: in the order to compute them.
        keep: slots of the next move's memory.
        index: evaluations done before it.
        levels: alpha and sigma (2,) float64, in the uniform form.
        next: the next move; None at the end.
    """

    query: Query | None
    state: int
    names: tuple[str, ...]
    raw: bool
    rows: tuple[Sum, ...]
    keep: Slots
    index: int
    levels: Tensor | None = None
    next: Move | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the next one: a chain of a thousand would be too deep to copy. `Program` ties it again."""
        return {**self.__dict__, "next": None}


@dataclass(frozen=True)
class Program:
    """A tableau to walk.

    Attributes:
        opening: rows before the first query; they read and extend the slots of ``given``.
        given: names that the engine puts into memory at the start.
        moves: one per query, and one for the end.
    """

    opening: tuple[Sum, ...]
    given: tuple[str, ...]
    moves: tuple[Move, ...]

    def __post_init__(self) -> None:
        """Tie every move to the next: looked up by position, each would be a case of its own to a compiler."""
        for move, after in pairwise(self.moves):
            move.next = after

    def __reduce__(self) -> tuple[type[Program], tuple[Any, ...]]:
        """Copied and pickled by its parts."""
        return Program, (self.opening, self.given, self.moves)


def program(
    opening: Sequence[Row], stages: Sequence[Stage], result: str, given: tuple[str, ...], *, uniform: bool = False
) -> Program:
    """The rows and stages of a tableau with slots for names.

    Args:
        opening: see `samplers.Tableau`.
        stages: likewise.
        result: likewise.
        given: names that are in memory at the start: "x0", and "first_x0" and "one" where the tableau uses them.
        uniform: the form for compilation; the plain one where a coefficient is a tensor.
    """
    uniform = uniform and not any(torch.is_tensor(c) for stage in stages for row in stage.rows for _, c in row.terms)
    names = list(given)
    started = tuple([_sum(row, names, uniform=False) for row in opening])
    kept = [tuple(names), *(_order(stage.keep, stages, i) for i, stage in enumerate(stages))]
    if uniform:  # after the first move, as many slots as the longest history needs
        width = max(map(len, kept))
        kept = [names_before + ("",) * (width - len(names_before)) for names_before in kept]
    raw = any(stage.raw is not None for stage in stages) if uniform else None
    moves = [_move(stage, kept[i], kept[i + 1], i, raw) for i, stage in enumerate(stages)]
    if uniform:
        _fill(moves)
    moves.append(Move(None, kept[-1].index(result), kept[-1], False, (), (), len(stages)))
    return Program(started, given, tuple(moves))


def _fill(moves: list[Move]) -> None:
    """Take history that is missing from where it is found in most moves, so that all of them look alike."""
    for slot in range(len(moves[0].keep) if moves else 0):
        found = Counter(move.keep[slot] for move in moves if move.keep[slot] != MISSING)
        usual = found.most_common(1)[0][0] if found else 0
        for move in moves:
            if move.keep[slot] == MISSING:
                move.keep = (*move.keep[:slot], usual, *move.keep[slot + 1 :])


def _order(keep: frozenset[str], stages: Sequence[Stage], i: int) -> tuple[str, ...]:
    """Names after stage i: the state that is evaluated next, then from the latest node on."""
    state = stages[i + 1].query.state if i + 1 < len(stages) else ""
    return tuple(sorted(keep, key=lambda name: (name != state, -_node(name), name)))


def _node(name: str) -> int:
    digits = name.lstrip("abcdefghijklmnopqrstuvwxyz_")
    return int(digits) if digits.isdigit() else -1


def _move(stage: Stage, before: tuple[str, ...], after: tuple[str, ...], index: int, uniform_raw: bool | None) -> Move:
    """One stage; ``uniform_raw`` says for the uniform form whether any stage keeps its raw answer, and is None otherwise."""
    query, uniform = stage.query, uniform_raw is not None
    raw = uniform_raw if uniform_raw is not None else stage.raw is not None
    names = [*before, *([stage.raw or ""] if raw else []), query.output]
    rows = tuple([_sum(row, names, uniform) for row in stage.rows])
    keep = tuple(names.index(name) if name else MISSING for name in after)
    both = [torch.as_tensor(level, dtype=torch.float64) for level in (query.alpha, query.sigma)]  # they may need gradients
    levels = torch.stack(both) if uniform else None
    return Move(query, before.index(query.state), before, raw, rows, keep, index, levels)


def _sum(row: Row, names: list[str], uniform: bool) -> Sum:
    """``row`` over the slots of ``names``, which grows by its target."""
    terms = dict(row.terms)
    if uniform:
        slots = tuple(range(len(names)))
        weights = tuple(float(terms.get(name, 0.0)) for name in names)
        made = Sum(slots, weights, row.noise, torch.tensor(weights, dtype=torch.float64))
    else:
        made = Sum(tuple(names.index(name) for name in terms), tuple(terms.values()), row.noise)
    names.append(row.target)
    return made

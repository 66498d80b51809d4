"""What a compiled schedule is made of: weighted sums over named tensors, and the queries between them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .parametrization import Scalar

Terms = dict[str, Scalar]  # name in memory -> coefficient; names: x3 state, c3 corrected, d3 x0, r3 raw x0,
# e3 re-evaluated, first_x0 the data's mean, one: ones. A coefficient may be a tensor that broadcasts to the state's shape.


@dataclass(frozen=True)
class Row:
    """``memory[target] = sum of coefficient * memory[name]``, plus ``noise`` times a standard normal draw."""

    target: str
    terms: tuple[tuple[str, Scalar], ...]
    noise: Scalar = 0.0

    def like(self, x: Tensor) -> Row:
        """With coefficients that have a shape in the dtype and place of ``x``."""
        terms = tuple((name, c.to(x) if torch.is_tensor(c) and c.ndim else c) for name, c in self.terms)
        return Row(self.target, terms, self.noise)


@dataclass(frozen=True)
class Query:
    """One network evaluation: at ``memory[state]``, time ``t`` (0-d float64), answer kept as ``output``."""

    state: str
    output: str
    t: Tensor
    alpha: Scalar
    sigma: Scalar
    node: int


@dataclass(frozen=True)
class Stage:
    """A query, the rows its answer makes possible, and the names still needed after them."""

    query: Query
    rows: tuple[Row, ...]
    keep: frozenset[str]
    raw: str | None  # where the unclipped x0 is kept, if a row needs it


def add(terms: Terms, scale: Scalar, other: Terms) -> None:
    """``terms += scale * other``."""
    for name, value in other.items():
        terms[name] = terms[name] + scale * value if name in terms else scale * value


def row(target: str, terms: Terms, more: Terms | None = None, noise: Scalar = 0.0) -> Row:
    """A row without the terms that are zero."""
    if more:
        add(terms, 1.0, more)
    kept = tuple((name, c) for name, c in terms.items() if torch.is_tensor(c) or c != 0.0)
    return Row(target, kept or tuple(terms.items())[:1], noise)  # a row that is zero still has the state's shape


def fuse(rows: list[Row], later: set[str]) -> tuple[Row, ...]:
    """Substitute corrected states into the rows after them when nothing else reads them: one weighted sum less."""
    fused: dict[str, Row] = {}
    out = []
    for old in rows:
        terms: Terms = {}
        for name, c in old.terms:
            add(terms, c, dict(fused[name].terms) if name in fused else {name: 1.0})
        new = row(old.target, terms, noise=old.noise)
        if old.target.startswith("c") and old.target not in later:
            fused[old.target] = new
        else:
            out.append(new)
    return tuple(out)

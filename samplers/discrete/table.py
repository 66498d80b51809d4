"""`DiscreteTable`: what a discrete sampler does at each step, as data. Plain samplers and learned ones are both tables."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from .grids import time_grid
from .transitions import transition

FORMAT = 1
KNOBS = ("rate", "temp", "count", "unmask", "remask")


@dataclass(frozen=True)
class DiscreteTable:
    """A base transition and global numbers per step: the LSD family (Fu et al. 2025, arXiv:2509.19962, and relatives).

    A knob that is None, or whose number at a step changes nothing (1 for rate and temp, 0 for remask), skips its operation.

    Attributes:
        process: "masked" or "uniform".
        transition: the base transition's text, as in `transition`.
        times: M + 1 decreasing times from 1 to 0.
        rate: M multipliers of the jump rates, > 0 (the paper's coefficient).
        temp: M exponents of the posterior before the step, > 0 (an inverse temperature).
        count: M numbers of tokens to reveal, >= 0, their sum is the sequence length they were made for; other lengths and
            prompts scale them, fractions are rounded at random.
        unmask: M probabilities with which a masked token is revealed; the last is 1.
        remask: M probabilities with which a generated token is masked again after the step; the last is 0.
        provenance: JSON notes on where the numbers come from.
    """

    process: str
    transition: str
    times: Sequence[float]
    rate: Sequence[float] | None = None
    temp: Sequence[float] | None = None
    count: Sequence[float] | None = None
    unmask: Sequence[float] | None = None
    remask: Sequence[float] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def plain(cls, process: str, base: str, nfe: int, grid: str = "uniform") -> DiscreteTable:
        """The untouched sampler ``base`` with ``nfe`` network evaluations on a named time grid (see `time_grid`)."""
        chosen = transition(base)
        steps = chosen.steps(nfe)
        if chosen.kind == "two_stage":
            chosen = replace(chosen, parameters=chosen.parameters | {"last": 2 - nfe % 2})
        table = cls(process, chosen.text, tuple(time_grid(grid, steps)))
        table.validate()
        return table

    @property
    def steps(self) -> int:
        """Number M of steps."""
        return len(self.times) - 1

    @property
    def nfe(self) -> int:
        """Network evaluations of a run."""
        return transition(self.transition).nfe(self.steps)

    @property
    def learned(self) -> dict[str, Sequence[float]]:
        """The knobs that are present."""
        return {name: values for name in KNOBS if (values := getattr(self, name)) is not None}

    def knob(self, name: str, index: int, neutral: float) -> Any:
        """Number of a knob at a step; ``neutral`` where the table does not have the knob."""
        values = getattr(self, name)
        return neutral if values is None else values[index]

    def masked_share(self, index: int) -> float:
        """Share of sites still masked after a network evaluation, as the table plans it (remasking left out)."""
        base = transition(self.transition)
        if index >= self.nfe - 1:
            return 0.0
        step = index // base.nfe_per_step
        if self.count is not None:
            return 1.0 - sum(self.count[: step + 1]) / sum(self.count)
        if self.unmask is not None:
            return math.prod(1.0 - u for u in self.unmask[: step + 1])
        if base.kind in ("count", "confidence"):
            return 1.0 - (step + 1) / self.steps
        return float(self.times[step + 1])

    def validate(self) -> None:
        """Check every number.

        Raises:
            ValueError: naming the field, what it holds and what is allowed.
        """
        base = transition(self.transition)
        base.check(self.process)
        times = [float(t) for t in self.times]
        if len(times) < 2 or abs(times[0] - 1.0) > 1e-9 or abs(times[-1]) > 1e-9:
            raise ValueError(f"times must run from 1 to 0, got {times}")
        if any(later >= earlier for earlier, later in pairwise(times)):
            raise ValueError(f"times must decrease, got {times}")
        for name, values in self.learned.items():
            if name not in base.knobs or (name in ("unmask", "remask", "count") and self.process != "masked"):
                raise ValueError(f"{self.transition} on the {self.process} process has no {name} knob; it has {base.knobs}")
            numbers = [float(v) for v in values]
            if len(numbers) != self.steps:
                raise ValueError(f"{name} needs one number per step, {self.steps}, got {len(numbers)}")
            low, high = {"rate": (0.0, 1e6), "temp": (1e-6, 1e3), "count": (0.0, 1e9)}.get(name, (0.0, 1.0))
            if any(not low <= v <= high for v in numbers):
                raise ValueError(f"{name} must stay in [{low:g}, {high:g}], got {numbers}")
        if self.count is not None and not sum(self.count) > 0:
            raise ValueError("count must reveal at least one token")
        if self.unmask is not None and float(self.unmask[-1]) != 1.0:
            raise ValueError(f"unmask must end with 1, it ends with {float(self.unmask[-1])}")
        if self.remask is not None and float(self.remask[-1]) != 0.0:
            raise ValueError(f"remask must end with 0, it ends with {float(self.remask[-1])}")

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        numbers = {name: [float(v) for v in values] for name, values in self.learned.items()}
        head = {"format": FORMAT, "process": self.process, "transition": self.transition}
        return head | {"times": [float(t) for t in self.times]} | numbers | {"provenance": dict(self.provenance)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DiscreteTable:
        """Read the JSON form.

        Raises:
            ValueError: unknown keys or format, or numbers out of range.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"a discrete table is read from a mapping, got {type(data).__name__}; of a table take .to_dict()")
        data = dict(data)
        if data.pop("format", FORMAT) != FORMAT:
            raise ValueError(f"this version reads discrete tables of format {FORMAT}")
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(data) - known):
            raise ValueError(f"unknown keys {unknown} in a discrete table; known: {sorted(known)}")
        if missing := sorted({"process", "transition", "times"} - set(data)):
            raise ValueError(f"a discrete table needs {missing}")
        table = cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in data.items()})
        table.validate()
        return table

    def save(self, path: str | Path) -> Path:
        """Write JSON, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".part")
        partial.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        return partial.replace(path)

    @classmethod
    def load(cls, source: str | Path | Mapping[str, Any], model_digest: str | None = None) -> DiscreteTable:
        """A table from its JSON file or dict; warns if it was fitted to another model than ``model_digest``."""
        if not isinstance(source, Mapping):
            path = Path(source)
            if not path.is_file():
                raise FileNotFoundError(f"no discrete table at {path}")
            source = json.loads(path.read_text(encoding="utf-8"))
        table = cls.from_dict(source)
        fitted = table.provenance.get("model_digest")
        if model_digest and fitted and fitted != model_digest:
            warnings.warn(f"this table was fitted to model {fitted}, not to {model_digest}", stacklevel=2)
        return table


def resample_table(table: DiscreteTable, nfe: int) -> DiscreteTable:
    """A table for another NFE: times and reveals interpolated over progress, the other knobs over time.

    It is a guess between fits, marked ``interpolated`` in its provenance.
    """
    plain = DiscreteTable.plain(table.process, transition(table.transition).name, nfe)
    here, there = _progress(table.steps), _progress(plain.steps)
    times = np.interp(there, here, [float(t) for t in table.times])
    numbers: dict[str, Any] = {}
    for name, values in table.learned.items():
        if name == "count":
            total = np.interp(there, here, np.concatenate([[0.0], np.cumsum([float(v) for v in values])]))
            numbers[name] = tuple(np.diff(total).tolist())
        elif name == "unmask":
            left = np.concatenate([[1.0], np.cumprod(1.0 - np.asarray(values, dtype=float))])
            share = np.interp(there, here, left)
            numbers[name] = (*np.clip(1.0 - share[1:-1] / np.maximum(share[:-2], 1e-12), 0.0, 1.0).tolist(), 1.0)
        else:
            asked = -np.asarray(table.times[:-1], dtype=float)  # np.interp wants increasing places
            numbers[name] = tuple(np.interp(-times[:-1], asked, [float(v) for v in values]).tolist())
    if "remask" in numbers:
        numbers["remask"] = (*numbers["remask"][:-1], 0.0)
    two = transition(table.transition).kind == "two_stage"
    text = plain.transition if two else table.transition
    notes = dict(table.provenance) | {"interpolated": f"from {table.nfe} to {nfe} network evaluations"}
    result = DiscreteTable(table.process, text, (1.0, *times[1:-1].tolist(), 0.0), **numbers, provenance=notes)
    result.validate()
    return result


def _progress(steps: int) -> np.ndarray:
    return np.linspace(0.0, 1.0, steps + 1)

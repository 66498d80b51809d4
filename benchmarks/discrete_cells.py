"""What the parts of the discrete benchmark share: results kept line by line, seeds, samplers by name, quiet fits."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from discrete_tasks import entropy_bound_table, evaluations
from torch import Tensor

from distill import FitSettings, fit_discrete_sampler
from samplers.discrete import DiscreteTable, MaskedProcess, Model, Process, UniformProcess, sample_discrete

PROCESSES = {"masked": MaskedProcess, "uniform": UniformProcess}
PLAIN = {
    "masked": ["euler", "tau", "remdm", "theta_trapezoidal", "theta_rk2", "fixed_count", "confidence"],
    "uniform": ["euler", "tau", "tweedie", "theta_trapezoidal", "theta_rk2"],
}


class Cells:
    """Results by key, one JSON line each: ``if cells.due(key): cells.put(scores)``."""

    def __init__(self, work: Path, nfes: Iterable[int] | None = None, targets: Iterable[str] | None = None) -> None:
        self.nfes, self.targets = nfes, targets  # of the fits of this run; None: all
        work.mkdir(parents=True, exist_ok=True)
        self.path, self.work, self.key, self.started = work / "cells.jsonl", work, "", 0.0
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.known = {cell["key"]: cell for cell in map(json.loads, lines)}

    def fits(self, nfe: int, target: str) -> bool:
        """Whether this run fits tables for a number of evaluations and a target."""
        return (self.nfes is None or nfe in self.nfes) and (self.targets is None or target in self.targets)

    def due(self, key: str) -> bool:
        self.key, self.started = key, time.process_time()
        return key not in self.known

    def put(self, found: dict, table: DiscreteTable | None = None) -> None:
        """Keep a result; of a fitted ``table`` its numbers too, and whether its own guards refused it."""
        found = {"key": self.key} | found | {"cpu_seconds": round(time.process_time() - self.started, 2)}
        if table is not None:
            found |= {"table": table.to_dict()}
            if "improves" in table.provenance:
                found |= {"refused": not table.provenance["improves"], "fit_seconds": table.provenance["seconds"]}
        with self.path.open("a") as file:
            file.write(json.dumps(found) + "\n")
        self.known[self.key] = found
        print(self.key, {k: round(v, 4) for k, v in found.items() if isinstance(v, float)}, flush=True)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fit(*args: object, **kwargs: object) -> DiscreteTable:
    """A fit whose refusal to call a table better is a result, not a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no improvement|the steps of LSD")
        return fit_discrete_sampler(*args, **kwargs)


def learned_knobs(process: str) -> tuple[str, ...]:
    """The family that is fitted where only one is."""
    return ("t", "temp") if process == "uniform" else ("count", "temp")


@dataclass
class Subject:
    """One model with one judge: every sampler of it is a cell under ``head``."""

    cells: Cells
    head: str
    model: Model
    process: Process
    shape: tuple[int, int]
    noise: int
    judge: Callable[[Tensor], dict]
    seed: int = 0
    knobs: str = ""

    def due(self, nfe: int, label: str) -> bool:
        return self.cells.due(f"{self.head}/{nfe}/{label}")

    def run(self, table: DiscreteTable) -> dict:
        ids = sample_discrete(self.model, self.process, self.shape, table=table, generator=seeded(self.noise))
        return self.judge(ids)

    def plain(self, nfe: int, bases: Iterable[str]) -> None:
        for base in bases:
            if self.due(nfe, base):
                self.cells.put(self.run(DiscreteTable.plain(self.process.name, base, nfe)))

    def cell(self, nfe: int, label: str, make: Callable[[], DiscreteTable]) -> None:
        if self.due(nfe, label):
            table = make()
            self.cells.put(self.run(table), table)

    def bound(self, nfe: int, rows: int) -> None:
        """Entropy-bound unmasking with ``nfe`` evaluations on average, and how many it made."""
        if self.due(nfe, "entropy_bound, mean NFE"):
            table = entropy_bound_table(self.model, self.process, self.shape[1], nfe, rows)
            start = self.process.prior(self.shape)
            ids, used = evaluations(self.model, self.process, start, table, seeded(self.noise))
            self.cells.put(self.judge(ids) | {"evaluations": used}, table)

    def learned(self, nfe: int, objective: str, target: str, given: Tensor | str, settings: FitSettings) -> None:
        name, length = f"learned {objective}, {target}", self.shape[1]
        knobs = self.knobs or learned_knobs(self.process.name)
        if not self.cells.fits(nfe, target):
            return
        self.cell(
            nfe,
            name,
            lambda: fit(self.model, self.process, length, nfe, knobs, objective, given, self.seed, settings=settings),
        )

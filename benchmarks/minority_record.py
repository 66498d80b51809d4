"""Rows of one part of the minority benchmark: kept in a JSON file, computed once, averaged over seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path

Row = dict[str, float]


def named(sampler: str) -> str:
    """How a table calls a sampler: recipe text as it is, a schedule file by what it is."""
    return "searched schedule" if sampler.endswith(".json") else sampler


class Record:
    """Results by row and seed; written after every row, so that an interrupted run goes on where it stopped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results: dict[str, dict[str, Row]] = json.loads(path.read_text()) if path.is_file() else {}

    def run(self, seed: int, rows: Iterable[tuple[str, Callable[[], Row]]], only: str = "") -> None:
        """Compute what is missing of the rows whose name contains ``only``; rows are kept in the order they come in."""
        names = []
        for name, compute in rows:
            if only not in name:
                names += [name] if name in self.results else []
                continue
            names.append(name)
            found = self.results.setdefault(name, {})
            if str(seed) in found:
                continue
            found[str(seed)] = compute()
            print(f"seed {seed}  {name}: " + "  ".join(f"{k} {v:.3f}" for k, v in found[str(seed)].items()), flush=True)
            self._write()
        ordered = {name: self.results[name] for name in [*names, *self.results]}
        if list(ordered) != list(self.results):
            self.results = ordered
            self._write()

    def _write(self) -> None:
        partial = self.path.with_name(self.path.name + ".part")
        partial.write_text(json.dumps(self.results, indent=1) + "\n")
        partial.replace(self.path)

    def table(self) -> str:
        """Markdown: mean over seeds, with the standard error of that mean."""
        rows = self.results
        columns = list(dict.fromkeys(key for row in rows.values() for found in row.values() for key in found))
        lines = ["| run | " + " | ".join(columns) + " | seeds |", "|---|" + "---|" * (len(columns) + 1)]
        for name, found in rows.items():
            cells = [_mean([row[key] for row in found.values() if key in row]) for key in columns]
            lines.append(f"| {name} | " + " | ".join(cells) + f" | {len(found)} |")
        return "\n".join(lines)


def _mean(values: list[float]) -> str:
    if not values:
        return ""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.3f}"
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
    return f"{mean:.3f} ± {error:.3f}"

"""``results.jsonl``: one line for each cell, only ever appended to; and what may be compared."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock

FILE = "results.jsonl"
Record = dict[str, Any]


def append(out: Path, record: Record, *, again: bool = False) -> bool:
    """Add a record unless its cell has one (or ``again``); safe with several processes.

    Returns:
        Whether it was added.
    """
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        if not again and record["key"] in {old["key"] for old in _lines(out)}:
            return False
        with (out / FILE).open("a+b") as file:
            _drop_unfinished_line(file)
            file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        return True


def _drop_unfinished_line(file: BinaryIO) -> None:
    """A process that was killed while it wrote left a line without an end; nothing whole is ever removed."""
    file.seek(0)
    content = file.read()
    file.truncate(content.rfind(b"\n") + 1)


def locked(out: Path) -> FileLock:
    """A lock on the results of a folder; it is free again when its process is killed."""
    return FileLock(out / ".results.lock")


def read_results(out: str | Path) -> list[Record]:
    """Records of a run's folder or of its ``results.jsonl``, the latest of each cell.

    Raises:
        FileNotFoundError: there are none.
        ValueError: a line that is no record.
    """
    path = Path(out)
    folder = path.parent if path.is_file() else path
    if not (folder / FILE).is_file():
        raise FileNotFoundError(f"{out} has no {FILE}; fewstep fid run makes one")
    latest = {(record["key"]): record for record in _lines(folder)}
    return list(latest.values())


def _lines(folder: Path) -> list[Record]:
    if not (folder / FILE).is_file():
        return []
    records = []
    text = (folder / FILE).read_text()
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines) and not text.endswith("\n"):  # killed while it wrote; the cell is scored again
                continue
            raise ValueError(f"{folder / FILE}, line {number}: {error}") from None
        if not isinstance(record, dict) or not {"key", "protocol", "sampler", "nfe", "mean"} <= record.keys():
            raise ValueError(f"{folder / FILE}, line {number} is no result of fewstep fid run")
        records.append(record)
    return records


def protocol_of(record: Record) -> str:
    """All that must agree before two numbers are compared: features, reference, number of images, what was generated."""
    reference = record["reference"]["id"][:16]
    parts = [record["protocol"], f"ref={reference}", f"n={record['n']}", f"model={record['weights'][:16]}"]
    return "|".join([*parts, f"what={record['conditioning_id'][:16]}", f"dtype={record['dtype']}"])


def groups(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Records that may stand in one table."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(protocol_of(record), []).append(record)
    return found


def diff(first: Sequence[Record], second: Sequence[Record]) -> list[dict[str, Any]]:
    """The cells of two runs side by side.

    Returns:
        One row for each sampler and NFE that both have: both means, their difference, and the standard error of it where
        both have repetitions.

    Raises:
        ValueError: numbers made in different ways, or nothing in common.
    """
    for what, label in (
        (lambda r: r["protocol"], "protocol"),
        (lambda r: f"{r['reference']['name']} ({r['reference']['id'][:12]})", "reference"),
        (lambda r: str(r["n"]), "number of images"),
    ):
        sides = [sorted({what(record) for record in records}) for records in (first, second)]
        if sides[0] != sides[1] or len(sides[0]) != 1:
            raise ValueError(f"these numbers cannot be compared: {label} {' / '.join(sides[0])} against {' / '.join(sides[1])}")
    cells = {_cell(record): record for record in second}
    rows = []
    for record in first:
        other = cells.get(_cell(record))
        if other is None:
            continue
        for metric in record["mean"].keys() & other["mean"].keys():
            a, b = record["mean"][metric], other["mean"][metric]
            rows.append({
                "model": record["model"], "sampler": record["sampler"], "nfe": record["nfe"], "metric": metric, "first": a,
                "second": b, "difference": b - a, "error": _error(record, other, metric),
                "same_seeds": record["seeds"] == other["seeds"],
            })  # fmt: skip
    if not rows:
        raise ValueError("the two runs have no model, sampler, NFE and metric in common")
    return sorted(rows, key=lambda row: (row["model"], row["sampler"], row["nfe"], row["metric"]))


def _cell(record: Record) -> tuple[str, str, int]:
    return record["model"], record["sampler"], record["nfe"]


def _error(first: Record, second: Record, metric: str) -> float | None:
    stds = [record["std"].get(metric) for record in (first, second)]
    if any(std is None for std in stds):
        return None
    return math.sqrt(sum(std**2 / record["repeats"] for std, record in zip(stds, (first, second), strict=True)))

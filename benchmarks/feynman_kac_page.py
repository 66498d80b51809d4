"""Renders docs/feynman_kac.md: the text around the numbers of `feynman_kac.py`, and the tables themselves."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

Row = Mapping[str, float]
BEGIN, END = "<!-- begin {} -->", "<!-- end {} -->"


def render(done: Mapping[str, Row], page: Path) -> None:
    """Put the tables that have numbers between their marks in ``page``; the text around them is written by hand."""
    text = page.read_text(encoding="utf-8")
    tables = {
        "gmm40": _variants(done, "gmm40", ("w1", "w2", "mmd", "tv", "dlogz", "roots")),
        "lj13": _variants(done, "lj13", ("w2", "e1", "e2", "tv", "dlogz", "roots")),
        "steps": _steps(done),
        "dimension": _dimension(done),
        "digits": _digits(done, "digits"),
        "one per group": _digits(done, "one per group"),
        "cost": _cost(done),
    }
    for name, table in tables.items():
        pattern = re.compile(re.escape(BEGIN.format(name)) + ".*?" + re.escape(END.format(name)), re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"{page} has no marks for the table {name!r}")
        if table:
            block = "\n".join([BEGIN.format(name), *table, END.format(name)])
            text = pattern.sub(lambda match, block=block: block, text)
    page.write_text(text, encoding="utf-8")


def _collect(done: Mapping[str, Row], section: str) -> dict[tuple[str, str], list[Row]]:
    found: dict[tuple[str, str], list[Row]] = {}
    for key, row in done.items():
        parts = key.split("/")
        if parts[0] == section:
            found.setdefault((parts[1], parts[2]), []).append(row)
    return found


def _number(rows: Sequence[Row], name: str) -> str:
    values = [row[name] for row in rows if name in row]
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.3g}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *(f"| {' | '.join(row)} |" for row in rows)]


def _variants(done: Mapping[str, Row], section: str, names: Sequence[str]) -> list[str]:
    found = sorted(
        _collect(done, section).items(), key=lambda item: (item[0][0], ("", "none", "FKC", "wrong sign").index(item[0][1]))
    )
    rows = [[a, b, str(len(r)), *(_number(r, n) for n in names)] for (a, b), r in found]
    return _table(("proposal", "weights", "seeds", *names), rows) if rows else []


def _dimension(done: Mapping[str, Row]) -> list[str]:
    found = _collect(done, "dimension")
    sizes = sorted({int(d) for _, d in found})
    cell = "{:.3g} / {:.0f} / {:.0%}"
    rows = []
    for target in dict.fromkeys(name for name, _ in found):
        cells = [found.get((target, str(d)), [None])[0] for d in sizes]
        rows.append([target, *("" if c is None else cell.format(c["ess"], c["roots"], c["worst_step"]) for c in cells)])
    return _table(("target", *(f"d = {d}" for d in sizes)), rows) if rows else []


def _steps(done: Mapping[str, Row]) -> list[str]:
    rows = [[grid, n, *(_number(r, v) for v in ("none", "FKC"))] for (grid, n), r in _collect(done, "steps").items()]
    return _table(("grid uniform in", "steps", "none", "FKC"), rows) if rows else []


def _digits(done: Mapping[str, Row], section: str) -> list[str]:
    found = _collect(done, section)
    names = ("accuracy", "distance", "roots") if section == "digits" else ("accuracy", "distance")
    rows = [[w, k, *(_number(r, n) for n in names)] for (w, k), r in found.items()]
    return _table(("guidance", "K", *names), rows) if rows else []


def _cost(done: Mapping[str, Row]) -> list[str]:
    rows = []
    for (_, k), (row,) in _collect(done, "cost").items():
        times = (f"{row['network_s']:.1f} s", f"{row['corrector_s'] * 1e3:.2f} ms", f"{row['share']:.4%}")
        rows.append([k, *times, f"{row['trace_bytes_per_step']:.0f} bytes"])
    return _table(("K", "U-Net, one step", "corrector, one step", "share", "trace, per step and group"), rows) if rows else []

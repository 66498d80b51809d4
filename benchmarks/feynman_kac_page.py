"""Renders docs/feynman_kac.md: the text around the numbers of `feynman_kac.py`, and the tables themselves."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

Row = Mapping[str, float]
IMAGES = {"100": 20, "400": 10}  # of each class, by network calls per image
BEGIN, END = "<!-- begin {} -->", "<!-- end {} -->"


def render(done: Mapping[str, Row], page: Path) -> None:
    """Put the tables that have numbers between their marks in ``page``; the text around them is written by hand."""
    text = page.read_text(encoding="utf-8")
    tables = {
        "gmm40": _variants(done, "gmm40", ("w1", "w2", "mmd", "tv", "dlogz", "roots")),
        "lj13": _variants(done, "lj13", ("w2", "e1", "e2", "tv", "dlogz", "roots")),
        "steps": _steps(done),
        "dimension": _dimension(done),
        "exact digits": _law(done),
        "digits one": _one(done),
        "digits all": _all(done),
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


def _law(done: Mapping[str, Row]) -> list[str]:
    names, rows = ("distance", "spread", "dlogz", "ess"), []
    for (w, cell), r in sorted(_collect(done, "exact digits").items(), key=lambda item: (item[0][0], _group(item[0][1]))):
        rows.append([w, *_cell(cell), *(_number(r, n) for n in names)])
    return _table(("guidance", "calls", "K", "steps", *names), rows) if rows else []


def _one(done: Mapping[str, Row]) -> list[str]:
    names, rows = ("log_p", "distance", "frechet", "spread", "ess"), []
    found = _collect(done, "digits one")
    for (key, cell), r in sorted(found.items(), key=lambda item: _place(*item[0])):
        budget, _, w = key.partition(" ")
        rows.append(
            [f"real digits, {IMAGES[budget]} a class" if w == "real" else w, *_cell(cell), *(_number(r, n) for n in names)]
        )
    return _table(("guidance", "calls", "K", "steps", *names), rows) if rows else []


def _all(done: Mapping[str, Row]) -> list[str]:
    names = ("accuracy", "log_p", "distance", "frechet", "spread", "roots")
    rows = [[w, k, *(_number(r, n) for n in names)] for (w, k), r in _collect(done, "digits all").items()]
    return _table(("guidance", "K", *names), rows) if rows else []


def _cell(text: str) -> tuple[str, str, str]:
    """Calls, K and steps of "K x steps"; of anything else the text itself."""
    k, _, steps = text.partition(" x ")
    return (str(_calls(text)[0]), k, steps) if steps else (text, "", "")


def _group(cell: str) -> tuple[int, int]:
    """Order of a row within its guidance: by the hundreds of calls, then K."""
    calls, k = _calls(cell)
    return round(calls / 100), k


def _place(key: str, cell: str) -> tuple[int, float, int]:
    """Order of a row: by budget, real digits first, guidance, K."""
    budget, _, w = key.partition(" ")
    return int(budget), 0.0 if w == "real" else float(w), _calls(cell)[1]


def _calls(text: str) -> tuple[int, int]:
    k, _, steps = text.partition(" x ")
    return (int(k) * int(steps), int(k)) if steps else (0, 0)


def _cost(done: Mapping[str, Row]) -> list[str]:
    rows = []
    for (_, k), (row,) in _collect(done, "cost").items():
        seconds = (f"{row['network_s']:.1f} s", f"{row['corrector_s'] * 1e3:.2f} ms", f"{row['share']:.3%}")
        peaks = (f"{row['network_peak_bytes'] / 2**20:.0f} MiB", f"{row['peak_bytes'] / 2**20:.2f} MiB")
        counts = (f"{row['network_operations']:.0f}", f"{row['operations']:.0f}", f"{row['kept_bytes']:.0f} bytes")
        rows.append([k, *seconds, *peaks, f"{row['peak_bytes'] / row['network_peak_bytes']:.2%}", *counts])
    head = ("K", "U-Net, time", "corrector", "share", "U-Net, peak memory", "corrector", "share", "U-Net, operations")
    return _table((*head, "corrector", "kept of a step"), rows) if rows else []

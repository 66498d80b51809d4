"""Tables of samplers (rows) against NFE (columns): markdown for people, CSV for programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from .results import Record, groups

LABELS = {
    "kd": "Kernel distance (not KID)", "kid": "KID", "cmmd": "CMMD", "sw2": "Sliced W2 of features",
    "energy": "Energy distance of features",
    "clip_score": "CLIPScore", "precision": "Precision (k = 3)", "recall": "Recall (k = 3)", "density": "Density (k = 5)",
    "coverage": "Coverage (k = 5)",
}  # fmt: skip
HIGHER_IS_BETTER = {"precision", "recall", "density", "coverage", "clip_score"}
HIDDEN = ("_low", "_high")


def markdown(records: Sequence[Record]) -> str:
    """One section for each protocol, one table for each metric in it."""
    parts = []
    for group in groups(records).values():
        first = group[0]
        parts.append(f"## {first['model']}: {first['n']} images, {first['reference']['name']}\n")
        parts.extend(f"{line}  " for line in description(group))
        parts.append("")
        for metric in metrics_of(group):
            parts.append(f"### {label(metric, first)}\n")
            parts.append(_table(group, metric) + "\n")
    return "\n".join(parts).rstrip() + "\n"


def description(group: Sequence[Record]) -> list[str]:
    """What a reader must know about the numbers of a table."""
    first = group[0]
    seeds = sorted({f"{low} to {high - 1}" for record in group for low, high in record["seeds"]})
    lines = [
        f"Protocol `{first['protocol']}`, reference `{first['reference']['name']}` "
        f"(`{first['reference']['id'][:12]}`, {first['reference']['n'] or 'unknown'} images), seeds {', '.join(seeds)}.",
    ]
    if first.get("unit_variance"):
        lines.append("The Frechet distance is in units of the reference's total variance.")
    if first["floor"]:
        floor = f"{number(first['floor']['value'])} ({first['floor']['method']})"
        lines.append(f"Floor, real against real: {floor}; in parentheses, times the floor.")
    odd = sorted({f"{r['sampler']} makes {r['nfe_counted']:g} at {r['nfe']}" for r in group if r["nfe_counted"] != r["nfe"]})
    if odd:
        lines.append(f"Evaluations counted by a hook: {'; '.join(odd)}.")
    passes = sorted({record["passes"] for record in group if record["passes"] != 1})
    if passes:
        lines.append(f"Guidance: {', '.join(f'{value:g}' for value in passes)} network passes an evaluation.")
    return lines


def metrics_of(group: Sequence[Record]) -> list[str]:
    """The metrics of a group in a fixed order, interval bounds left out."""
    found = {metric for record in group for metric in record["mean"] if not metric.endswith(HIDDEN)}
    order = ["fid", "fd", "fid_inf", "fd_inf", *LABELS]
    return sorted(found, key=lambda metric: (order.index(metric) if metric in order else len(order), metric))


def label(metric: str, record: Record) -> str:
    """Name of a metric with the number of images, as in "FID (tf), 5k images"."""
    title = record["title"]
    name = {"fid": title, "fd": title, "fid_inf": f"{title}, N to infinity", "fd_inf": f"{title}, N to infinity"}.get(metric)
    arrow = "higher" if metric in HIGHER_IS_BETTER else "lower"
    return f"{name or LABELS.get(metric, metric)}, {count(record['n'])} images ({arrow} is better)"


def count(n: int) -> str:
    """5000 as 5k."""
    return f"{n // 1000}k" if n % 1000 == 0 and n else str(n)


def number(value: float) -> str:
    """A value with four significant digits, without an exponent where that is short."""
    return f"{value:.4g}" if abs(value) < 1e-4 else f"{value:#.4g}".rstrip(".")


def cell(record: Record, metric: str) -> str:
    """A value with its standard deviation over seeds, its interval, or how many times the floor it is."""
    value, std = record["mean"][metric], record["std"].get(metric)
    if f"{metric}_low" in record["mean"]:
        return f"{number(value)} [{number(record['mean'][metric + '_low'])}, {number(record['mean'][metric + '_high'])}]"
    text = number(value) if std is None else f"{number(value)} ± {std:.1g}"
    floor = record["floor"]["value"] if record["floor"] and metric in ("fid", "fd") else 0.0
    return f"{text} ({value / floor:.1f})" if floor > 0 else text


def rows(group: Sequence[Record], metric: str) -> tuple[list[int], list[tuple[str, list[tuple[str, bool]]]]]:
    """NFEs, and for each sampler its cells: text, and whether it is the best of its column."""
    nfes = sorted({record["nfe"] for record in group})
    by_cell = {(record["sampler"], record["nfe"]): record for record in group if metric in record["mean"]}
    best = max if metric in HIGHER_IS_BETTER else min
    tops = {}
    for nfe in nfes:
        values = [record["mean"][metric] for (_, n), record in by_cell.items() if n == nfe]
        tops[nfe] = best(values) if len(values) > 1 else None
    table = []
    for sampler in dict.fromkeys(record["sampler"] for record in group):
        line = []
        for nfe in nfes:
            record = by_cell.get((sampler, nfe))
            line.append(("", False) if record is None else (cell(record, metric), record["mean"][metric] == tops[nfe]))
        table.append((sampler, line))
    return nfes, table


def _table(group: Sequence[Record], metric: str) -> str:
    nfes, table = rows(group, metric)
    lines = ["| sampler | " + " | ".join(f"NFE {nfe}" for nfe in nfes) + " |", "| --- |" + " ---: |" * len(nfes)]
    for sampler, cells in table:
        lines.append(f"| {sampler} | " + " | ".join(f"**{text}**" if top else text for text, top in cells) + " |")
    return "\n".join(lines)


def csv_text(records: Sequence[Record]) -> str:
    """One line for each record and metric."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    head = ["model", "sampler", "nfe", "nfe_counted", "passes"]
    writer.writerow([*head, "metric", "mean", "std", "n", "repeats", "protocol", "reference"])
    for record in records:
        tail = [record["n"], record["repeats"], record["protocol"], record["reference"]["id"][:16]]
        for metric, value in record["mean"].items():
            std = record["std"].get(metric)
            writer.writerow([*(record[key] for key in head), metric, repr(value), "" if std is None else repr(std), *tail])
    return buffer.getvalue()

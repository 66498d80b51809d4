"""The report of a distillation: what was learned, drawn; and quality against network evaluations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from samplers.discrete import DiscreteTable, Model, Process, push_table

from .judge import default_holdout, exact_scores, floor_scores, sampled_scores
from .statistics import HammingMMD
from .target import Target, draw_many

GAPS = ("nll_gap", "entropy_gap")
Row = dict[str, Any]


def evaluate(
    model: Model,
    process: Process,
    seq_len: int,
    tables: Mapping[str, DiscreteTable],
    target: Target,
    *,
    names: Sequence[str] | None = None,
    samples: int = 4000,
    seed: int = 0,
    batch: int = 500,
    device: str = "cpu",
) -> list[Row]:
    """Scores of every table, one row each: exact where the target is a law, else from fresh samples with the floor's row first.

    Args:
        model: as in `fit_discrete_sampler`.
        process: the noising process.
        seq_len: sequence length.
        tables: by label.
        target: judged against its law or its held-out ids.
        names: held-out statistics; None: those that fit.
        samples: sequences per table.
        seed: of the samples; not one the fit used.
        batch: sequences per model call.
        device: where sampling runs.
    """
    import torch

    if target.law is not None:
        with torch.no_grad():
            laws = {label: push_table(model, process, seq_len, table) for label, table in tables.items()}
        rows = [{"sampler": label, "nfe": tables[label].nfe} | exact_scores(target.law, law) for label, law in laws.items()]
        return rows
    held_out = target.held_out
    chosen = tuple(names or default_holdout("", process.vocab, seq_len, len(held_out)))
    distance = HammingMMD(held_out[:3000], process.vocab)
    rows = [{"sampler": "target against itself", "nfe": None, **floor_scores(held_out, chosen, process.vocab)}]
    for label, table in tables.items():
        generator = torch.Generator().manual_seed(7_000_003 + seed)
        ids = draw_many(model, process, samples, seq_len, table, generator, batch, device)
        scores = sampled_scores(ids, held_out, chosen, process.vocab) | {"mmd": distance(ids[:3000])}
        rows.append({"sampler": label, "nfe": table.nfe} | scores)
    return rows


def write_report(out: Path, rows: Sequence[Row], tables: Mapping[str, DiscreteTable]) -> Path:
    """Write ``report.json`` and ``report.png`` into ``out``; return the picture's path."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps({"rows": list(rows)}, indent=1) + "\n", encoding="utf-8")
    statistics = [name for name in rows[-1] if name not in ("sampler", "nfe")]
    learned = {label: table for label, table in tables.items() if table.learned or table.provenance}
    panels = ["t", *sorted({name for table in learned.values() for name in table.learned})]
    columns = max(len(statistics), len(panels))
    figure, axes = plt.subplots(2, columns, figsize=(3.2 * columns, 5.6), squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], statistics, strict=False):
        _quality(axis, rows, name)
    for axis, name in zip(axes[1], panels, strict=False):
        for label, table in learned.items():
            values = table.times if name == "t" else getattr(table, name)
            if values is not None:
                axis.plot(range(len(values)), [float(v) for v in values], marker="o", markersize=3, label=label)
        axis.set(title={"t": "times"}.get(name, name), xlabel="step")
    for axis in [*axes[0][len(statistics) :], *axes[1][len(panels) :]]:
        axis.set_axis_off()
    for axis in (axes[0][0], axes[1][0]):
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=6)
    path = out / "report.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _quality(axis: Any, rows: Sequence[Row], name: str) -> None:
    """One statistic against NFE: a line per kind of sampler, the floor dashed."""
    kinds: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["nfe"] is None:
            if row.get(name) is not None:
                axis.axhline(row[name], linestyle="--", linewidth=0.8, color="grey")
        else:
            kinds.setdefault(row["sampler"].rpartition(" ")[0] or row["sampler"], []).append((row["nfe"], row[name]))
    for kind, points in kinds.items():
        axis.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=kind)
    axis.set(title=name, xlabel="network evaluations")
    if name in GAPS:
        axis.axhline(0.0, linewidth=0.8, color="black")
    elif all(value > 0 for points in kinds.values() for _, value in points):
        axis.set_yscale("log")

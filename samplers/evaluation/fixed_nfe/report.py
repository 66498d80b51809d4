"""The files that are made from ``results.jsonl``: tables, figures and one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from .figures import figure_uri, grid_uri, quality_figure, save_figure
from .results import Record, groups
from .shards import ShardFolder
from .tables import csv_text, description, label, markdown, metrics_of, rows

SHOWN = 16


def write_tables(out: Path, records: Sequence[Record]) -> None:
    """Write ``table.md`` and ``table.csv``."""
    _write(out / "table.md", markdown(records))
    _write(out / "table.csv", csv_text(records))


def write_figures(out: Path, records: Sequence[Record]) -> list[Path]:
    """Write ``plot.png`` and ``plot.svg``; numbered when there are several protocols. Gives the PNGs."""
    groups_ = list(groups(records).values())
    stems = [out / ("plot" if len(groups_) == 1 else f"plot-{i}") for i in range(1, len(groups_) + 1)]
    for stem, group in zip(stems, groups_, strict=True):
        save_figure(quality_figure(group), stem)
    return [stem.with_suffix(".png") for stem in stems]


def write_report(out: Path, records: Sequence[Record]) -> Path:
    """Write ``report.html``: tables, figures, and the same seeds side by side; nothing in it is loaded from elsewhere."""
    template = resources.files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    sections = [_section(out, group) for group in groups(records).values()]
    path = out / "report.html"
    _write(path, environment.from_string(template).render(sections=sections, records=len(records)))
    return path


def _section(out: Path, group: list[Record]) -> dict[str, Any]:
    first = group[0]
    tables = []
    for metric in metrics_of(group):
        nfes, lines = rows(group, metric)
        figure = figure_uri(quality_figure(group, metric))
        tables.append({"label": label(metric, first), "nfes": nfes, "lines": lines, "figure": figure})
    grids: dict[int, list[dict[str, str]]] = {}
    for record in sorted(group, key=lambda record: record["nfe"]):
        images = _images(out, record)
        if images is not None:
            grids.setdefault(record["nfe"], []).append({"sampler": record["sampler"], "uri": images})
    seeds = first["seeds"][0]
    return {
        "model": first["model"],
        "n": first["n"],
        "reference": first["reference"]["name"],
        "facts": [line.replace("`", "") for line in description(group)],
        "versions": ", ".join(f"{name} {version}" for name, version in first["versions"].items()),
        "tables": tables,
        "grids": grids,
        "seeds": f"{seeds[0]} to {min(seeds[0] + SHOWN, seeds[1]) - 1}",
        "cost": _cost(group),
    }


def _images(out: Path, record: Record) -> str | None:
    folder, (low, high) = ShardFolder(out / "shards", record["cell"]), record["first_shard"]
    if not folder.file(range(low, high)).is_file():
        return None
    images = folder.read(range(low, high)).images
    return grid_uri(images) if len(images) else None


def _cost(group: Sequence[Record]) -> str:
    images = sum(record["n"] * record["repeats"] for record in group)
    sampling, features, cpu = (sum(r["seconds"][key] for r in group) for key in ("sampling", "features", "cpu"))
    return (
        f"{images} images in {len(group)} cells: {sampling:.0f} s of sampling, {features:.0f} s of features (at the same "
        f"time), {cpu:.0f} s of processor time"
    )


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)

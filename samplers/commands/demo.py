"""``fewstep demo``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .common import JsonOption, out_console, progress_bar


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the picture, the table and the numbers.")] = Path("demo-output"),
    images: Annotated[int, typer.Option(min=1, help="Images per sampler.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the first image.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Sample the shipped pipeline in a few steps, next to diffusers' own schedulers: a table and a picture. Offline."""
    from .. import evaluation, strategy

    config = json.loads((strategy.configs_folder() / "demo.json").read_text())
    pipe = evaluation.load_pipeline(config["model"], offline=True)
    what = evaluation.Conditioning(guidance=config["guidance"])
    batch = range(images)
    with progress_bar() as bar:
        task = bar.add_task("converged solution", total=1 + len(config["samplers"]) * len(config["nfe"]))
        reference = evaluation.converged(pipe, what, batch, steps=config["reference_nfe"], seed=seed)
        bar.advance(task)

        def step(text: str) -> None:
            bar.update(task, description=text, advance=1)

        results = evaluation.compare(
            pipe, what, config["samplers"], config["nfe"], images=batch, reference=reference, seed=seed, progress=step
        )
    out.mkdir(parents=True, exist_ok=True)
    evaluation.comparison_figure(results, reference, out / "demo.png")
    rows = [result.row() for result in results]
    record = {"model": config["model"], "guidance": config["guidance"], "images": images, "seed": seed, "results": rows}
    (out / "demo.json").write_text(json.dumps(record, indent=1) + "\n")
    (out / "demo.md").write_text(_markdown(rows, config["nfe"]))
    if as_json:
        typer.echo(json.dumps(record))
        return
    title = f"RMSE to the {config['reference_nfe']}-evaluation solution, {images} images of {config['model']}"
    table = Table("sampler", *(f"{n} NFE" for n in config["nfe"]), title=title)
    best = {n: min(r["rmse"] for r in rows if r["nfe"] == n) for n in config["nfe"]}
    for name, values in _by_sampler(rows).items():
        cells = (f"[bold]{_cell(values, n)}[/]" if values.get(n) == best[n] else _cell(values, n) for n in config["nfe"])
        table.add_row(name, *cells)
    out_console.print(table)
    out_console.print(f"picture: {out / 'demo.png'}   numbers: {out / 'demo.json'}, {out / 'demo.md'}")


def _by_sampler(rows: list[dict[str, Any]]) -> dict[str, dict[int, float]]:
    table: dict[str, dict[int, float]] = {}
    for row in rows:
        table.setdefault(row["sampler"], {})[row["nfe"]] = row["rmse"]
    return table


def _markdown(rows: list[dict[str, Any]], nfes: list[int]) -> str:
    lines = ["| sampler | " + " | ".join(f"{n} NFE" for n in nfes) + " |", "|---|" + "---|" * len(nfes)]
    for name, values in _by_sampler(rows).items():
        lines.append(f"| {name} | " + " | ".join(_cell(values, n) for n in nfes) + " |")
    return "\n".join(lines) + "\n"


def _cell(values: dict[int, float], nfe: int) -> str:
    return f"{values[nfe]:.4f}" if nfe in values else "-"

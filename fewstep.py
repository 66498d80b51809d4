"""fewstep: how few network calls does a diffusion model need? The command line."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

USAGE, MISSING, INCOMPLETE = 2, 3, 4  # exit codes; 0 is success
INTERRUPTED = 130  # what typer returns after Ctrl-C

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
schedule_app = typer.Typer(help="Look at, check and list solver schedules.", no_args_is_help=True)
app.add_typer(schedule_app, name="schedule")
out_console, err_console = Console(), Console(stderr=True)

ModelOption = Annotated[str, typer.Option("--model", help="Reference pipeline, diffusers folder or hub id.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of a table.")]
NoiseOption = Annotated[
    str, typer.Option("--noise", help="Noise schedule: vp_linear, vp_cosine, sd, ddpm, edm, flow or flow:SHIFT.")
]
SamplerArgument = Annotated[str, typer.Argument(help="Recipe text, path of a JSON schedule, or a shipped name.")]


def progress_bar() -> Progress:
    """A progress bar with counts and remaining time, on stderr."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=err_console)


# ---- demo --------------------------------------------------------------------------------------------------------


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the picture, the table and the numbers.")] = Path("demo-output"),
    images: Annotated[int, typer.Option(min=1, help="Images per sampler.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the first image.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Sample the shipped pipeline in a few steps, next to diffusers' own schedulers: a table and a picture. Offline."""
    from samplers import evaluation, strategy

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
        cells = (f"[bold]{values[n]:.4f}[/]" if values[n] == best[n] else f"{values[n]:.4f}" for n in config["nfe"])
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
        lines.append(f"| {name} | " + " | ".join(f"{values[n]:.4f}" for n in nfes) + " |")
    return "\n".join(lines) + "\n"


# ---- sample ------------------------------------------------------------------------------------------------------


@app.command()
def sample(
    sampler: Annotated[str, typer.Option(help="Recipe text, path of a JSON schedule, or a shipped name.")],
    nfe: Annotated[int, typer.Option(min=1, help="Network evaluations per image.")],
    out: Annotated[Path, typer.Option(help="Folder for the images; an interrupted run in it is completed.")],
    num: Annotated[int, typer.Option(min=1, help="Number of images.")] = 16,
    model: ModelOption = "digits-conditional",
    prompt: Annotated[str | None, typer.Option(help="Text prompt.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="File with one prompt a line; images take them in turn.")] = None,
    class_labels: Annotated[str | None, typer.Option(help="Comma-separated classes; images take them in turn.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    height: Annotated[int | None, typer.Option(min=1)] = None,
    width: Annotated[int | None, typer.Option(min=1)] = None,
    device: Annotated[str, typer.Option(help="Torch device.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    seed: Annotated[int, typer.Option(help="Seed of image 0; image i has seed + i.")] = 0,
    offline: Annotated[bool, typer.Option("--offline", help="Never reach for the hub.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Sample images with any solver schedule into a folder of PNGs."""
    from samplers import evaluation
    from samplers.evaluation.folders import sample_folder

    texts = tuple(filter(None, prompts.read_text().splitlines())) if prompts else (prompt,) if prompt else ()
    what = evaluation.Conditioning(texts, _integers(class_labels), guidance, height, width)
    pipe = evaluation.load_pipeline(model, device=device, dtype=dtype, offline=offline)
    what.check(pipe)
    settings = {
        "model": model, "sampler": sampler, "nfe": nfe, "num": num, "seed": seed, "dtype": dtype, "prompts": list(texts),
        "class_labels": list(what.class_labels), "guidance": guidance, "height": height, "width": width,
    }  # fmt: skip
    with progress_bar() as bar:
        task = bar.add_task("images", total=num)
        record = sample_folder(
            pipe, what, sampler, out, nfe=nfe, num=num, batch_size=batch_size, seed=seed, settings=settings,
            progress=lambda done: bar.update(task, completed=done),
        )  # fmt: skip
    if as_json:
        typer.echo(json.dumps({**record, "out": str(out)}))
    else:
        counted = f"{record['counted_nfe']:g} evaluations each" if "counted_nfe" in record else "already there"
        out_console.print(f"{num} images in {out} ({counted}); grid: {out / 'grid.png'}")


def _integers(text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise ValueError(f"--class-labels {text!r}: expected comma-separated whole numbers") from None


# ---- schedules ---------------------------------------------------------------------------------------------------


def _noise_named(name: str) -> Any:
    from samplers import NoiseSchedule

    kind, _, value = name.partition(":")
    ddpm = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    latent = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    known: dict[str, Callable[[], Any]] = {
        "vp_linear": NoiseSchedule.vp_linear,
        "vp_cosine": NoiseSchedule.vp_cosine,
        "ddpm": lambda: NoiseSchedule.from_config(ddpm),
        "sd": lambda: NoiseSchedule.from_config(latent),
        "edm": NoiseSchedule.edm,
        "flow": lambda: NoiseSchedule.flow(float(value or 1.0)),
    }
    if kind not in known:
        raise ValueError(f"unknown noise schedule {name!r}; known: {', '.join(known)}")
    return known[kind]()


def _schedule_of(sampler: str, noise: Any, nfe: int | None) -> Any:
    """Recipe text with --nfe, or a fixed schedule that agrees with it."""
    from samplers import SolverSchedule, recipe
    from samplers.recipes import canonical

    if canonical(sampler) is not None:
        if nfe is None:
            raise ValueError(f"recipe {sampler!r} needs --nfe")
        return recipe(sampler, noise, nfe)
    schedule = SolverSchedule.load(sampler)
    if nfe not in (None, schedule.nfe):
        raise ValueError(f"{sampler} has {schedule.nfe} network evaluations, --nfe asks for {nfe}")
    return schedule


@schedule_app.command("show")
def schedule_show(
    sampler: SamplerArgument,
    nfe: Annotated[int | None, typer.Option(min=1, help="Network evaluations (recipes).")] = None,
    noise: NoiseOption = "sd",
    plot: Annotated[Path | None, typer.Option(help="Also draw it into this PNG.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show a schedule step by step."""
    from samplers import Tableau

    levels = _noise_named(noise)
    schedule = _schedule_of(sampler, levels, nfe)
    tableau = Tableau.build(schedule, levels, first_x0=_placeholder(schedule))
    if plot is not None:
        from samplers.evaluation import schedule_figure

        schedule_figure([schedule], levels, plot)
    if as_json:
        typer.echo(json.dumps(schedule.to_dict()))
        return
    rows = [row for stage in tableau.stages for row in stage.rows]
    by_end = {row.target: row for row in (*tableau.opening, *rows)}
    title = f"{schedule.name or sampler}: NFE {schedule.nfe}"
    table = Table("step", "t", "to", "order", "pred", "corrector", "update", title=title)
    for i, step in enumerate(schedule.steps):
        source = "" if step.eval.source == "model" else f" ({step.eval.source})"
        corrector = "" if step.corr is None else f"order {step.corr.order}"
        update = " ".join(f"{c:+.4g} {name}" for name, c in by_end[f"x{i + 1}"].terms)
        cells = (str(i), f"{schedule.times[i]:.5g}", f"{schedule.times[i + 1]:.5g}", f"{step.order}{source}", str(step.pred))
        table.add_row(*cells, corrector, f"x{i + 1} = {update}")
    out_console.print(table)
    out_console.print("x: states, c: corrected states, d: x0-predictions, by node number")


def _placeholder(schedule: Any) -> Any:
    """Stands in for the data's mean: the coefficients do not depend on it."""
    import torch

    return torch.zeros(1) if schedule.steps[0].eval.source == "average_x0" else None


@schedule_app.command("validate")
def schedule_validate(
    sampler: SamplerArgument,
    nfe: Annotated[int | None, typer.Option(min=1, help="Network evaluations (recipes).")] = None,
    noise: NoiseOption = "sd",
) -> None:
    """Check a schedule file or recipe: structure, placement of every step, and finite coefficients."""
    from samplers import Tableau

    levels = _noise_named(noise)
    schedule = _schedule_of(sampler, levels, nfe)
    Tableau.build(schedule, levels, first_x0=_placeholder(schedule))
    steps, nfe_of, digest = len(schedule.steps), schedule.nfe, schedule.digest
    out_console.print(f"{sampler}: valid, {steps} steps, {nfe_of} network evaluations, digest {digest}")


@schedule_app.command("list")
def schedule_list(as_json: JsonOption = False) -> None:
    """List recipes with their options, and the schedules that ship."""
    from samplers import RECIPES, SolverSchedule, shipped_schedules
    from samplers.recipes import ALIASES

    shipped = {name: SolverSchedule.load(path).nfe for name, path in sorted(shipped_schedules().items())}
    if as_json:
        recipes = {r.name: {"options": r.defaults, "summary": r.summary} for r in RECIPES.values()}
        typer.echo(json.dumps({"recipes": recipes, "aliases": ALIASES, "schedules": shipped}))
        return
    table = Table("recipe", "options", "what it is")
    for r in RECIPES.values():
        table.add_row(r.name, ", ".join(f"{k}={v}" for k, v in r.defaults.items()), r.summary)
    for alias, text in ALIASES.items():
        table.add_row(alias, "", f"= {text}")
    for name, count in shipped.items():
        table.add_row(name, f"NFE {count}", "schedule that ships")
    out_console.print(table)


# ---- doctor ------------------------------------------------------------------------------------------------------


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """What is installed, which weights are where, what is missing and how to get it."""
    import torch

    from samplers import reference, shipped_schedules

    packages = ("fewstep", "torch", "torchvision", "diffusers", "transformers", "torchmetrics", "scikit-learn", "optuna")
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    cache = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface")) / "hub"
    report = {
        "python": platform.python_version(),
        "packages": found,
        "devices": ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        + (["mps"] if torch.backends.mps.is_available() else []),
        "reference_pipelines": reference.names(),
        "schedules": sorted(shipped_schedules()),
        "hub_models": sorted(p.name.removeprefix("models--").replace("--", "/") for p in cache.glob("models--*")),
    }
    if as_json:
        typer.echo(json.dumps(report))
        return
    table = Table("what", "found", "if missing")
    table.add_row("python", report["python"], "")
    for name, version in found.items():
        table.add_row(name, version or "[red]not installed[/]", "" if version else f"pip install {name}")
    table.add_row("devices", ", ".join(report["devices"]), "")
    table.add_row("reference pipelines", ", ".join(report["reference_pipelines"]) or "none", "reinstall fewstep")
    table.add_row("schedules", ", ".join(report["schedules"]) or "none", "")
    table.add_row("hub models", ", ".join(report["hub_models"]) or "none", f"downloaded on first use into {cache}")
    out_console.print(table)


def main() -> None:
    """Run the command line; errors are one line on stderr and an exit code."""
    try:
        code = app(standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        code = _exit_code(error)
        if code is None:
            raise
    if code == INTERRUPTED:
        err_console.print("interrupted; the same command continues where it stopped")
        code = INCOMPLETE
    sys.exit(code or 0)


def _exit_code(error: Exception) -> int | None:
    """Print a user's error and give its exit code; None for what must be a defect."""
    show = getattr(error, "show", None)  # click's usage errors; typer may carry its own copy of click
    if callable(show):
        show()
        return USAGE
    if not isinstance(error, ValueError | FileNotFoundError | IsADirectoryError | PermissionError):
        return None
    err_console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
    return MISSING if type(error).__name__ == "MissingModelError" else USAGE


if __name__ == "__main__":
    main()

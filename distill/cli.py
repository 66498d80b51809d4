"""``fewstep distill``: learn few-step samplers for a discrete diffusion model, and judge them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from samplers.commands.common import DeviceOption, JsonOption, err_console, integers, out_console, progress_bar

if TYPE_CHECKING:
    from samplers.discrete import DiscreteTable

    from .config import DistillConfig, Problem

app = typer.Typer(help="Learn few-step samplers for a discrete diffusion model, and judge them.", no_args_is_help=True)

OutArgument = Annotated[Path, typer.Argument(help="Folder that `distill run` wrote.")]


@app.command()
def run(
    config: Annotated[str, typer.Argument(help="JSON config, or the name of one that ships (see --list).")] = "",
    out: Annotated[Path, typer.Option(help="Folder for tables, teacher samples and the report; a rerun continues.")] = Path(
        "distilled"
    ),
    nfe: Annotated[str | None, typer.Option(help="Comma-separated network evaluations, instead of the config's.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Token model, instead of the config's.")] = None,
    target: Annotated[str | None, typer.Option(help="Target, instead of the config's.")] = None,
    objective: Annotated[str | None, typer.Option(help="Objective, instead of the config's.")] = None,
    budget: Annotated[int | None, typer.Option(min=1, help="Candidates or gradient steps per family.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed, instead of the config's.")] = None,
    device: DeviceOption = "cpu",
    show: Annotated[bool, typer.Option("--list", help="List the configs that ship.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Fit one table per NFE, then evaluate them against plain samplers."""
    from .config import problem_of, read_config, settings_of

    if show or not config:
        if not show:
            raise ValueError(f"name a config: a JSON file, or one of {', '.join(sorted(_shipped()))}")
        for name in sorted(_shipped()):
            typer.echo(name)
        return
    changes = {"model": model, "target": target, "objective": objective, "budget": budget, "seed": seed}
    chosen = _changed(read_config(_path(config)), nfe=list(integers("--nfe", nfe)) or None, **changes)
    problem = problem_of(chosen, device)
    out.mkdir(parents=True, exist_ok=True)
    _remember(out / "config.json", chosen)
    settings = settings_of(chosen, out / "work", device)
    for count in chosen.nfe:
        path = out / f"nfe-{count}.json"
        if path.is_file():
            err_console.print(f"NFE {count}: {path} is there already", highlight=False)
            continue
        _fit(problem, chosen, settings, count, path)
    _judge(out, chosen, problem, settings, as_json)


@app.command("eval")
def evaluate(out: OutArgument, device: DeviceOption = "cpu", as_json: JsonOption = False) -> None:
    """Evaluate the tables of a finished run again: scores at every NFE, and the picture."""
    from .config import problem_of, read_config, settings_of

    if not (out / "config.json").is_file():
        raise FileNotFoundError(f"{out} was not written by `fewstep distill run`: it has no config.json")
    config = read_config(out / "config.json")
    missing = [str(count) for count in config.nfe if not (out / f"nfe-{count}.json").is_file()]
    if missing:
        raise FileNotFoundError(f"{out} has no table for NFE {', '.join(missing)}: run `fewstep distill run` to the end")
    _judge(out, config, problem_of(config, device), settings_of(config, out / "work", device), as_json)


def _shipped() -> dict[str, Path]:
    from samplers.strategy import configs_folder

    return {path.stem: path for path in (configs_folder() / "distill").glob("*.json")}


def _path(config: str) -> Path:
    shipped = _shipped()
    if config in shipped:
        return shipped[config]
    if not Path(config).is_file():
        raise FileNotFoundError(f"no distill config {config!r}: give a JSON file, or one of {', '.join(sorted(shipped))}")
    return Path(config)


def _changed(config: DistillConfig, **changes: Any) -> DistillConfig:
    import msgspec

    from .config import check_config

    given = {name: value for name, value in changes.items() if value is not None}
    if "model" in given:
        given["law"] = None
    config = msgspec.structs.replace(config, **given)
    check_config(config)
    return config


def _remember(path: Path, config: DistillConfig) -> None:
    """Keep the config; refuse a folder that holds results of another run (more NFE may join)."""
    import msgspec

    from .config import read_config

    if path.is_file() and any([*path.parent.glob("nfe-*.json"), *path.parent.glob("work/*.json")]):
        before = read_config(path)
        if msgspec.structs.replace(before, nfe=config.nfe, compare=config.compare) != config:
            raise ValueError(f"{path.parent} holds another run: name another --out, or remove it")
        config = msgspec.structs.replace(config, nfe=sorted({*before.nfe, *config.nfe}))
    partial = path.with_suffix(".part")
    partial.write_bytes(msgspec.json.format(msgspec.json.encode(config), indent=1) + b"\n")
    partial.replace(path)


def _fit(problem: Problem, config: DistillConfig, settings: Any, nfe: int, path: Path) -> None:
    """Fit one NFE under a progress bar, and save its table."""
    from .fit import fit_discrete_sampler

    with progress_bar() as bar, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tasks: dict[str, Any] = {}

        def note(stage: str, done: int, total: int, value: float) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            text = f"NFE {nfe}: {stage}" + (f" {value:.4g}" if value else "")
            bar.update(tasks[stage], completed=done, description=text)

        table = fit_discrete_sampler(
            problem.model,
            problem.process,
            problem.seq_len,
            nfe,
            config.knobs,
            config.objective,
            problem.target,
            config.seed,
            base=config.base,
            settings=settings,
            progress=note,
        )
    for warning in caught:
        err_console.print(f"warning: {warning.message}", markup=False, highlight=False, soft_wrap=True)
    table.save(path)


def _judge(out: Path, config: DistillConfig, problem: Problem, settings: Any, as_json: bool) -> None:
    """Evaluate, draw, and print one line per sampler."""
    from rich.table import Table

    from samplers.discrete import DiscreteTable

    from .report import evaluate as scores_of
    from .report import write_report
    from .target import enumerable, resolve_target

    tables: dict[str, DiscreteTable] = {}
    bases = config.compare or (["tweedie"] if problem.process.name == "uniform" else ["fixed_count"])
    for base in bases:
        for nfe in sorted({count for n in config.nfe for count in (n, 2 * n, 3 * n)}):
            tables[f"{base} {nfe}"] = DiscreteTable.plain(problem.process.name, base, nfe)
    for nfe in config.nfe:
        tables[f"learned {nfe}"] = DiscreteTable.load(out / f"nfe-{nfe}.json")
    exact = enumerable(problem.process, problem.seq_len) and config.objective in ("auto", "exact_kl")
    target = resolve_target(
        problem.target,
        problem.model,
        problem.process,
        problem.seq_len,
        exact=exact,
        teacher=settings.teacher,
        folder=settings.folder,
        batch=settings.batch,
        device=settings.device,
    )
    rows = scores_of(
        problem.model,
        problem.process,
        problem.seq_len,
        tables,
        target,
        names=settings.holdout,
        samples=settings.judged,
        seed=config.seed,
        batch=settings.batch,
        device=settings.device,
    )
    picture = write_report(out, rows, tables)
    if as_json:
        typer.echo(json.dumps({"rows": rows, "picture": str(picture)}))
        return
    names = [name for name in rows[-1] if name not in ("sampler", "nfe")]
    grid = Table("sampler", "NFE", *names)
    for row in rows:
        numbers = [f"{row[name]:.4g}" if name in row else "" for name in names]
        grid.add_row(row["sampler"], "" if row["nfe"] is None else str(row["nfe"]), *numbers)
    out_console.print(grid)
    for nfe in config.nfe:
        notes = tables[f"learned {nfe}"].provenance
        if not notes.get("improves", True):
            text = f"learned {nfe} is no improvement over plain {notes.get('plain', 'samplers')}: {'; '.join(notes['reasons'])}"
            out_console.print(text, markup=False, highlight=False)
    out_console.print(f"tables: {out}/nfe-*.json   picture: {picture}", highlight=False)

"""``fewstep search run|status|best|export``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.table import Table

from samplers.commands.common import (
    BatchSizeOption,
    ClassLabelsOption,
    DeviceOption,
    DtypeOption,
    HeightOption,
    JsonOption,
    ModelOption,
    OfflineOption,
    PromptOption,
    PromptsOption,
    SeedOption,
    WidthOption,
    conditioning,
    err_console,
    numbers,
    out_console,
    progress_bar,
)

app = typer.Typer(help="Search for the solver schedule of a model and a number of evaluations.", no_args_is_help=True)

StorageOption = Annotated[str, typer.Option("--storage", help="sqlite:///FILE, a file name, or postgresql://...")]
StudyOption = Annotated[str | None, typer.Option("--study", help="Study name; the only one in the storage when not given.")]
HALF_PRECISION = 3e-2  # by which refinement moves a number where the network rounds to three digits or fewer
BLURRED = 0.25  # of a schedule's error: a reference that is less certain than that is worth a word
ASSUMED_RATE = (
    20.0  # guided evaluations per second of an SD-size model on one data-centre GPU: an assumption, not a measurement
)


@app.command()
def run(
    nfe: Annotated[int, typer.Option(min=1, help="Network evaluations of the schedule.")],
    out: Annotated[Path, typer.Option(help="File for the schedule that is found.")],
    strategy: Annotated[str, typer.Option(help="s3, evolution, random, tpe, cmaes or gp.")] = "s3",
    trials: Annotated[int, typer.Option(min=1, help="Evaluated schedules, other workers' and earlier runs' included.")] = 200,
    storage: Annotated[
        str | None, typer.Option(help="sqlite:///FILE or postgresql://...; default: a file beside --out. Workers share it.")
    ] = None,
    study: Annotated[str | None, typer.Option(help="Name of the study in the storage.")] = None,
    noises: Annotated[int, typer.Option(min=2, help="Starting noises that schedules are searched on.")] = 64,
    reference_nfe: Annotated[int, typer.Option(min=20, help="Evaluations of the converged solution.")] = 100,
    refine: Annotated[int, typer.Option(min=0, help="Rounds of least squares after the search; 0 for none.")] = 6,
    baselines: Annotated[int, typer.Option(min=1, help="Classic solvers x grids to start from and compare with.")] = 500,
    model: ModelOption = "digits-conditional",
    prompt: PromptOption = None,
    prompts: PromptsOption = None,
    class_labels: ClassLabelsOption = None,
    guidance: Annotated[
        str | None,
        typer.Option(help="Guidance scale, or several as 5,7.5,10: the schedule is then searched for their average."),
    ] = None,
    height: HeightOption = None,
    width: WidthOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    batch_size: BatchSizeOption = 64,
    seed: SeedOption = 0,
    offline: OfflineOption = False,
    report: Annotated[Path | None, typer.Option(help="Also write an HTML report.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what it would cost and stop.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Search, re-rank, refine and score on held-out noises. Any number of processes may run the same command."""
    from samplers import evaluation

    from . import SearchSpace
    from .find import find_schedule
    from .pipeline_problem import pipeline_problem
    from .report import write_report
    from .strategies import STRATEGIES

    if strategy not in STRATEGIES:
        raise ValueError(f"unknown strategy {strategy!r}; known: {', '.join(STRATEGIES)}")
    scales = numbers("--guidance", guidance)
    what = conditioning(prompt, prompts, class_labels, scales[0] if scales else None, height, width)
    pipe = evaluation.load_pipeline(model, device=device, dtype=dtype, offline=offline)
    what.check(pipe)
    call = what.arguments(pipe, range(max(len(what.prompts), len(what.class_labels), 1 if what.prompts else 10)))
    several = scales if len(scales) > 1 else ()
    if several:
        del call["guidance_scale"]
    problem = pipeline_problem(pipe, call, guidance_scales=several, batch_size=batch_size)
    if dry_run:
        _plan(problem, nfe, trials, noises, reference_nfe, refine, baselines, as_json)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    url = storage or f"sqlite:///{out.with_suffix('.db')}"
    cache = out.parent / "references"
    with progress_bar() as bar:
        task = bar.add_task("converged solutions", total=trials)
        objectives = [problem.endpoint(split, count, seed, reference_nfe, cache) for split, count in _splits(noises)]
        found = find_schedule(
            SearchSpace(problem.noise_schedule, nfe),
            *objectives,
            name=out.stem,
            trials=trials,
            strategy=strategy,
            storage=url,
            seed=seed,
            refine_rounds=refine,
            difference=None if dtype == "float32" else HALF_PRECISION,
            baseline_limit=baselines,
            facts={
                "model": model,
                "weights": problem.model,
                "guidance": scales[0] if len(scales) == 1 else list(scales) or None,
                "dtype": dtype,
            },
            progress=_live(bar, task),
            say=lambda text: bar.update(task, description=text),
            study_name=study,
        )
    found.schedule.save(out)
    if report is not None:
        write_report(found, report, decode=problem.decode, test=objectives[2])
    facts = found.schedule.provenance["scores"]
    if facts["reference_error"] > BLURRED * found.test.value:
        err_console.print(
            f"note: the converged solutions moved by {facts['reference_error']:.4f} (RMSE) when their evaluations were doubled "
            f"to {reference_nfe}, which is much beside the schedule's {found.test.value:.4f}: raise --reference-nfe"
        )
    if as_json:
        typer.echo(json.dumps({"out": str(out), "storage": url, "ratio": found.ratio, **facts}))
        return
    table = Table("schedule", "RMSE, held-out", "95% interval", title=f"{nfe} evaluations, {facts['noises']} noises of {model}")
    for row in (found.test, found.searched, *found.baselines.values()):
        table.add_row(row.name, f"{row.value:.4f}", f"{row.low:.4f} .. {row.high:.4f}")
    out_console.print(table)
    out_console.print(f"schedule: {out}   study: {url}" + (f"   report: {report}" if report else ""))


def _splits(noises: int) -> tuple[tuple[str, int], ...]:
    return ("train", noises), ("validation", noises), ("test", 2 * noises)


def _live(bar: Any, task: Any) -> Callable[[Any, Any], None]:
    """Best so far and evaluations per second, after every trial of this process."""
    start, done = time.monotonic(), [0]

    def after(study: Any, trial: Any) -> None:
        done[0] += 1
        complete = study.get_trials(deepcopy=False, states=(type(trial.state).COMPLETE,))
        best = min((t.value for t in complete), default=float("nan"))
        rate = done[0] / max(time.monotonic() - start, 1e-9)
        bar.update(task, completed=len(complete), description=f"search: best {best:.4f}, {rate:.2f} evaluations/s")

    return after


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _plan(
    problem: Any, nfe: int, trials: int, noises: int, reference_nfe: int, refine: int, baselines: int, as_json: bool
) -> None:
    """Forward passes per part, and their time here (measured) and for an SD-size model (assumed rate)."""
    import torch

    from .find import FINALISTS, rounds_in_all
    from .refine import evaluations_per_round
    from .selection import screening_cost

    x, t = problem.noises(min(noises, 16), 0), torch.tensor(0.5 * problem.noise_schedule.t_max, dtype=torch.float64)
    with torch.no_grad():
        problem.denoiser(x, t)
        rate = len(x) / median(_seconds(lambda: problem.denoiser(x, t)) for _ in range(5))
    total = sum(count for _, count in _splits(noises))
    parts = {
        "converged solutions": total * (reference_nfe + reference_nfe // 2),
        f"{trials} trials x {noises} noises x {nfe}": trials * noises * nfe,
        "re-ranking and scores": (FINALISTS + 2 + 4 * 2) * noises * nfe,
        f"{rounds_in_all(refine)} rounds of refinement": rounds_in_all(refine) * noises * (evaluations_per_round(nfe) + nfe),
        "baselines": screening_cost(baselines, noises) * nfe,
    }
    plan = {
        "forwards": parts,
        "total_forwards": sum(parts.values()),
        "seconds_here": sum(parts.values()) / rate,
        "forwards_per_second_here": rate,
        "hours_sd_size_assumed": sum(parts.values()) / ASSUMED_RATE / 3600,
        "assumed_rate_sd_size": ASSUMED_RATE,
    }
    if as_json:
        typer.echo(json.dumps(plan))
        return
    table = Table("part", "network evaluations of one sample", "here")
    for name, count in parts.items():
        table.add_row(name, f"{count:,}", f"{count / rate:,.0f} s")
    table.add_row("together", f"{plan['total_forwards']:,}", f"{plan['seconds_here']:,.0f} s")
    out_console.print(table)
    hours = plan["hours_sd_size_assumed"]
    out_console.print(
        f"{rate:,.0f} evaluations/s measured here. At {ASSUMED_RATE:g}/s (assumed: an SD-size model, guided, one GPU): "
        f"{hours:,.1f} h on one worker, {hours / 8:,.1f} h on eight."
    )


def _storage(url: str) -> Any:
    import optuna

    from .ledger import engine_options, storage_url

    url = storage_url(url)
    if url.startswith("sqlite:///") and not Path(url.removeprefix("sqlite:///")).is_file():
        raise FileNotFoundError(f"no study file {url.removeprefix('sqlite:///')}")
    return optuna.storages.RDBStorage(url, engine_kwargs=engine_options(url))


def _study(url: str, name: str | None) -> Any:
    import optuna

    storage = _storage(url)
    names = optuna.get_all_study_names(storage)
    if name is None and len(names) == 1:
        name = names[0]
    if name not in names:
        raise ValueError(
            f"{'name a' if name is None else f'no study {name!r}; choose a'} --study of: {', '.join(names) or 'none'}"
        )
    return optuna.load_study(study_name=name, storage=storage)


@app.command()
def status(storage: StorageOption, as_json: JsonOption = False) -> None:
    """The studies in a storage: trials by state, best value."""
    import optuna

    rows = []
    for summary in optuna.get_all_study_summaries(_storage(storage)):
        trials = optuna.load_study(study_name=summary.study_name, storage=_storage(storage)).get_trials(deepcopy=False)
        states = [trial.state.name for trial in trials]
        values = [trial.value for trial in trials if trial.state.name == "COMPLETE"]
        counts = {state.lower(): states.count(state) for state in ("COMPLETE", "RUNNING", "WAITING", "FAIL")}
        rows.append({"study": summary.study_name, **counts, "best": min(values, default=None)})
    if as_json:
        typer.echo(json.dumps(rows))
        return
    table = Table("study", "complete", "running", "waiting", "failed", "best")
    for row in rows:
        best = "" if row["best"] is None else f"{row['best']:.5f}"
        table.add_row(row["study"], *(str(row[key]) for key in ("complete", "running", "waiting", "fail")), best)
    out_console.print(table)


@app.command()
def best(
    storage: StorageOption, study: StudyOption = None, top: Annotated[int, typer.Option(min=1)] = 5, as_json: JsonOption = False
) -> None:
    """The best schedules of a study by the objective that was searched on (not held out)."""
    records = _best(storage, study, top)
    if as_json:
        typer.echo(json.dumps([{"trial": n, "value": value, "schedule": s.to_dict()} for n, value, s in records]))
        return
    table = Table("trial", "value", "NFE", "orders", "predictions", "first step", "times")
    for number, value, schedule in records:
        predictions = " ".join("mix" if isinstance(step.pred, tuple) else step.pred for step in schedule.steps)
        orders = " ".join(f"{step.order}{'c' if step.corr else ''}" for step in schedule.steps)
        times = " ".join(f"{t:.3g}" for t in schedule.times)
        table.add_row(str(number), f"{value:.5f}", str(schedule.nfe), orders, predictions, schedule.steps[0].eval.source, times)
    out_console.print(table)


@app.command()
def export(
    storage: StorageOption,
    out: Annotated[Path, typer.Option(help="File to write.")],
    study: StudyOption = None,
    trial: Annotated[int | None, typer.Option(help="Trial number; the best one when not given.")] = None,
) -> None:
    """Write a trial's schedule as a JSON file, without re-ranking or refinement."""
    from .selection import with_provenance

    found = _study(storage, study)
    records = _best(storage, study, None)
    if not records:
        raise ValueError(f"study {found.study_name!r} has no COMPLETE trial yet")
    chosen = records[0] if trial is None else next((r for r in records if r[0] == trial), None)
    if chosen is None:
        raise ValueError(f"trial {trial} is not among the {len(records)} COMPLETE trials of {found.study_name!r}")
    number, value, schedule = chosen
    facts = {"study": found.study_name, "trial": number, "value_searched_on": value, **found.user_attrs.get("fewstep", {})}
    with_provenance(schedule, out.stem, facts).save(out)
    err_console.print(f"trial {number}, value {value:.5f} on the noises it was searched on: {out}")


def _best(storage: str, study: str | None, top: int | None) -> list[tuple[int, float, Any]]:
    from .strategies import schedule_of

    trials = [t for t in _study(storage, study).get_trials(deepcopy=False) if t.state.name == "COMPLETE"]
    return [(t.number, t.value, schedule_of(t)) for t in sorted(trials, key=lambda t: t.value)[:top]]

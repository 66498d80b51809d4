"""What a scheduler costs: `SolverScheduler.step` and `set_timesteps` next to diffusers' own, in one process.

    python benchmarks/step_time.py                  the tables, also written to benchmarks/results/step_time.md and the README
    python benchmarks/step_time.py --check          exit code 1 when a target is missed
    python benchmarks/step_time.py --profile        where a step's time goes

Every time is CPU time of one thread, per step, from a whole run of 20 steps with the network left out. The contestants take
turns within a repeat, and a ratio is the median over repeats of the ratio within a repeat, so that a slow moment of the
machine hits both. Brackets hold the quartiles. Under glibc freed memory stays with the process, so that page faults, whose
number depends on what else was freed before, are in nobody's time.
"""

from __future__ import annotations

import argparse
import cProfile
import ctypes
import os
import platform
import pstats
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import diffusers
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from samplers.schedulers import SolverScheduler

RESULT = Path(__file__).parent / "results" / "step_time.md"
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- benchmarks/step_time.py -->\n", "<!-- end -->\n"  # around what the README shows of it
SHAPES = ((4, 4, 8, 8), (1, 4, 64, 64), (4, 16, 128, 128))
SMALL, MIDDLE, LARGE = SHAPES
STEPS = 20
SYNCS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::item")


@dataclass(frozen=True)
class Contest:
    """A diffusers scheduler and the recipe that does the same."""

    title: str
    theirs: Callable[[], Any]
    recipe: str
    small_limit: float

    def ours(self) -> SolverScheduler:
        """A new scheduler, whose tableau is in no cache."""
        return SolverScheduler.from_config(self.theirs().config, schedule=self.recipe)


CONTESTS = (
    Contest("DPM-Solver++ 2M", lambda: DPMSolverMultistepScheduler(solver_order=2), "dpmpp:order=2", 0.4),
    Contest("UniPC 3", lambda: UniPCMultistepScheduler(solver_order=3), "unipc:order=3", 0.15),
)


@dataclass
class Report:
    """Rows of the table and what the targets say about them."""

    lines: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    summary: list[str] = field(default_factory=list)

    def verdict(self, what: str, value: float, limit: float, unit: str = "x") -> str:
        """The target, marked when it is missed."""
        text = f"<= {limit:g} {unit}" if unit != "x" else f"<= {limit:g}x"
        if value <= limit:
            return text
        self.missed.append(f"{what}: {value:.3g}{'' if unit == 'x' else ' '}{unit}, target {text}")
        return f"{text} **missed**"


# ---- timing --------------------------------------------------------------------------------------------------------------


def prepared(scheduler: Any, steps: int = STEPS) -> list[Tensor]:
    """The timesteps of a new run."""
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    return list(scheduler.timesteps)


def run(scheduler: Any, timesteps: Sequence[Tensor], output: Tensor, x: Tensor) -> Tensor:
    """A run whose network always answers the same."""
    for t in timesteps:
        x = scheduler.step(output, t, x, return_dict=False)[0]
    return x


def run_once(scheduler: Any, output: Tensor, x: Tensor) -> float:
    """Seconds per step of a whole run, without `set_timesteps`."""
    timesteps = prepared(scheduler)
    start = time.process_time()
    run(scheduler, timesteps, output, x)
    return (time.process_time() - start) / len(timesteps)


def bare_once(widths: Sequence[Sequence[int]], tensors: Sequence[Tensor]) -> float:
    """Seconds per step of nothing but the run's weighted sums: one fused multiply-add per term."""
    start = time.process_time()
    for rows in widths:
        for width in rows:
            total = tensors[0] * 0.9
            for k in range(1, width):
                total = torch.add(total, tensors[k], alpha=0.1)
    return (time.process_time() - start) / len(widths)


def row_widths(scheduler: SolverScheduler) -> list[list[int]]:
    """Per step, the number of terms of each weighted sum."""
    assert scheduler.tableau is not None
    return [[len(row.terms) for row in stage.rows] for stage in scheduler.tableau.stages]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4)
    return low, middle, high


def spread(values: Sequence[float], scale: float = 1.0) -> str:
    """Median [quartiles], three digits each."""
    numbers = [value * scale for value in quartiles(values)]
    low, middle, high = (f"{number:.0f}" if number >= 1000 else f"{number:.3g}" for number in numbers)
    return f"{middle} [{low}, {high}]"


def time_steps(report: Report, repeats: int) -> None:
    """The table of step times."""
    report.lines += [
        "## `step`",
        "",
        "| solver | shape | diffusers, us | fewstep, us | ratio | target |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    report.summary += ["| solver | shape | diffusers, us | fewstep, us | ratio |", "| --- | --- | --- | --- | --- |"]
    bare_lines = []
    for contest in CONTESTS:
        for shape in SHAPES:
            generator = torch.Generator().manual_seed(0)
            output, x = (torch.randn(shape, generator=generator) for _ in range(2))
            theirs, ours = contest.theirs(), contest.ours()
            run_once(theirs, output, x), run_once(ours, output, x)  # warm up
            widths = row_widths(ours)
            tensors = [torch.randn(shape, generator=generator) for _ in range(max(map(max, widths)))]
            times: dict[str, list[float]] = {"theirs": [], "ours": [], "bare": []}
            for _ in range(repeats):
                times["theirs"].append(run_once(theirs, output, x))
                times["ours"].append(run_once(ours, output, x))
                times["bare"].append(bare_once(widths, tensors))
            ratios = [a / b for a, b in zip(times["ours"], times["theirs"], strict=True)]
            to_bare = [a / b for a, b in zip(times["ours"], times["bare"], strict=True)]
            what = f"{contest.title} at {shape}"
            limit = {SMALL: contest.small_limit, MIDDLE: 0.7, LARGE: 1.0}[shape]
            target = report.verdict(what, statistics.median(ratios), limit)
            if shape == SMALL:
                target += ", " + report.verdict(what, 1e6 * statistics.median(times["ours"]), 60.0, "us")
            columns = [spread(times[key], 1e6) for key in ("theirs", "ours")]
            row = f"| {contest.title} | {shape} | {' | '.join(columns)} | {spread(ratios)} |"
            report.lines.append(f"{row} {target} |")
            report.summary.append(row)
            if shape == LARGE:
                verdict = report.verdict(f"{what}, to the bare weighted sum", statistics.median(to_bare), 2.0)
                bare_lines.append(f"| {contest.title} | {spread(times['bare'], 1e6)} | {spread(to_bare)} | {verdict} |")
    report.lines += [
        "",
        f"Against the bare weighted sums of the same number of tensors at {LARGE}; a step also turns the network's output into "
        "the x0-prediction that the history keeps.",
        "",
        "| solver | bare sums, us | fewstep / bare | target |",
        "| --- | --- | --- | --- |",
        *bare_lines,
        "",
    ]


def time_set_timesteps(report: Report, repeats: int) -> None:
    """The table of `set_timesteps`, every time on a new scheduler."""
    report.lines += [
        "## `set_timesteps`",
        "",
        "| solver | steps | diffusers, ms | fewstep, ms | target |",
        "| --- | --- | --- | --- | --- |",
    ]
    for contest in CONTESTS:
        for steps, limit in ((20, 5.0), (1000, 1000.0)):
            times: dict[str, list[float]] = {"theirs": [], "ours": []}
            for _ in range(max(3, repeats if steps < 100 else repeats // 6)):
                for name, make in (("theirs", contest.theirs), ("ours", contest.ours)):
                    scheduler = make()
                    start = time.process_time()
                    scheduler.set_timesteps(steps)
                    times[name].append(1e3 * (time.process_time() - start))
            what = f"{contest.title}, set_timesteps({steps})"
            target = report.verdict(what, statistics.median(times["ours"]), limit, "ms")
            report.lines.append(
                f"| {contest.title} | {steps} | {spread(times['theirs'])} | {spread(times['ours'])} | {target} |"
            )
    report.lines.append("")


# ---- torch.compile and syncs -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compiled:
    """What torch.compile made of a run."""

    graphs: int
    breaks: int
    reasons: tuple[str, ...]


def compile_run(scheduler: Any, steps: int = 10, shape: tuple[int, ...] = SMALL) -> Compiled:
    """Graphs and graph breaks of a compiled `step` over a run; the backend runs the graphs as they are."""
    torch._dynamo.reset()
    counters.clear()
    graphs = 0

    def backend(module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return module.forward

    timesteps = prepared(scheduler, steps)
    with torch._dynamo.config.patch(recompile_limit=1000, accumulated_recompile_limit=1000):
        step = torch.compile(scheduler.step, backend=backend)
        x, output = torch.ones(shape), torch.ones(shape)
        for t in timesteps:
            x = step(output, t, x, return_dict=False)[0]
    reasons = dict(counters["graph_break"])
    torch._dynamo.reset()
    return Compiled(graphs, sum(reasons.values()), tuple(reason.splitlines()[0] for reason in reasons))


class SyncCounter(TorchDispatchMode):
    """Counts the operators that make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in SYNCS:
            self.seen.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def count_syncs(scheduler: Any, steps: int = 10) -> int:
    """Synchronising operators in the steps of a run."""
    timesteps = prepared(scheduler, steps)
    with SyncCounter() as counter:
        run(scheduler, timesteps, torch.ones(SMALL), torch.ones(SMALL))
    return len(counter.seen)


def runs_without_data(scheduler: Any, steps: int = 10) -> bool:
    """Whether a run works on tensors that have a shape and no values, which nothing can be read from."""
    x = torch.ones(SMALL, device="meta")
    try:
        return run(scheduler, prepared(scheduler, steps), x, x).is_meta
    except (RuntimeError, NotImplementedError):
        return False


def check_compilation(report: Report) -> None:
    """The table of graphs, breaks and syncs."""
    report.lines += [
        "## `torch.compile` and synchronisation, 10 steps",
        "",
        "| scheduler | graphs | graph breaks | syncs | runs on meta tensors | target |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for contest in CONTESTS:
        for scheduler, mine in ((contest.theirs(), False), (contest.ours(), True)):
            name = f"fewstep `{contest.recipe}`" if mine else f"diffusers {contest.title}"
            compiled, syncs, abstract = compile_run(scheduler), count_syncs(scheduler), runs_without_data(scheduler)
            target = "-"
            if mine:
                widths = len({width for rows in row_widths(scheduler) for width in rows})
                target = ", ".join(
                    (
                        report.verdict(f"{name}: graphs", compiled.graphs, widths, "graphs"),
                        report.verdict(f"{name}: graph breaks", compiled.breaks, 0, "breaks"),
                        report.verdict(f"{name}: syncs", syncs, 0, "syncs"),
                    )
                )
                if not abstract:
                    report.missed.append(f"{name}: a step reads a value off the device")
            answer = "yes" if abstract else "no"
            report.lines.append(f"| {name} | {compiled.graphs} | {compiled.breaks} | {syncs} | {answer} | {target} |")
            for reason in compiled.reasons:
                print(f"{name}: graph break: {reason}", file=sys.stderr)
    report.lines += [
        "",
        "The target is one graph per row width (number of terms in a weighted sum of the run), no break, no sync.",
        "",
    ]


# ---- report ----------------------------------------------------------------------------------------------------------------


def into_readme(report: Report) -> None:
    """Put the table of steps between the README's marks."""
    before, found, rest = README.read_text().partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not (found and closed):
        raise ValueError(f"{README.name} has no place for the table: {BEGIN.strip()} ... {END.strip()}")
    README.write_text(f"{before}{BEGIN}" + "\n".join(report.summary) + f"\n{END}{after}")


def header(repeats: int) -> Iterator[str]:
    """Title, versions and what the numbers mean."""
    yield "# Time of a scheduler step"
    yield ""
    yield "Written by `python benchmarks/step_time.py`. CPU time of one thread, float32, the network left out; per step of a"
    yield "20-step run."
    yield f"Median [quartiles] of {repeats} repeats, in which the contestants take turns; ratios are taken within a repeat."
    yield "Freed memory stays with the process (glibc), so page faults are in nobody's time."
    yield ""
    yield (
        f"Python {platform.python_version()}, torch {torch.__version__.partition('+')[0]}, diffusers {diffusers.__version__}, "
        f"{platform.machine()}, {os.cpu_count()} cores."
    )
    yield ""


def profile() -> None:
    """Where the time of a small step goes."""
    for contest in CONTESTS:
        scheduler = contest.ours()
        output, x = torch.randn(SMALL), torch.randn(SMALL)
        run_once(scheduler, output, x)
        recorder = cProfile.Profile()
        for _ in range(50):
            timesteps = prepared(scheduler)
            recorder.runcall(run, scheduler, timesteps, output, x)
        print(contest.recipe)
        pstats.Stats(recorder).sort_stats("tottime").print_stats(16)


def keep_freed_memory() -> None:
    """Tell glibc neither to map large tensors one by one nor to hand freed memory back."""
    if platform.libc_ver()[0] == "glibc":
        libc, trim, mmap, never = ctypes.CDLL(None), -1, -3, 2**31 - 1  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
        libc.mallopt(trim, never)
        libc.mallopt(mmap, 2**25)  # the highest value it takes


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30, help="repeats per contest and shape, at least 3")
    parser.add_argument("--out", type=Path, default=RESULT, help="where the table goes")
    parser.add_argument("--check", action="store_true", help="exit code 1 when a target is missed; write nothing")
    parser.add_argument("--profile", action="store_true", help="print a profile of a small step instead")
    options = parser.parse_args(arguments)
    if options.repeats < 3:
        parser.error("--repeats must be at least 3")
    keep_freed_memory()
    torch.set_num_threads(1)
    with torch.no_grad():
        if options.profile:
            profile()
            return 0
        report = Report()
        time_steps(report, options.repeats)
        time_set_timesteps(report, options.repeats)
        check_compilation(report)
    text = "\n".join([*header(options.repeats), *report.lines]).rstrip() + "\n"
    print(text)
    for line in report.missed:
        print(f"missed: {line}", file=sys.stderr)
    if options.check:
        return 1 if report.missed else 0
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text)
    if options.out == RESULT:
        into_readme(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Every recipe on every time grid at few network evaluations, beside diffusers' own classes, on five problems.

    python benchmarks/solvers.py run [--data cifar10-16px.npz] [--ledger benchmarks/results/solvers.jsonl] [--only NAME ...]
    python benchmarks/solvers.py report                                      write docs/benchmark.md from the ledger

The data file (uint8 NHWC arrays ``train`` and ``test``) adds the two CIFAR-10 problems. The run appends one line a result to
the ledger and skips what is there, so it resumes where it stopped. Noises on which grids are chosen (screen) and noises on
which the choice is reported (report) differ.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
from rich.progress import track
from solver_problems import CONFIG, NOISE, Problem, problems
from torch import Tensor

from samplers import parse_recipe, sample
from samplers.peers import Trajectory, gits, gits_cost, teacher_trajectory
from samplers.recipes import GRIDS

NFES = (4, 5, 6, 8, 10)
RECIPES = (
    "ddim",
    "dpmpp:order=2",
    "dpmpp:order=3",
    "dpmpp:order=3,taylor=true",
    "dpmpp:order=2,method=singlestep",
    "dpmpp:order=3,method=singlestep",
    "dpm:order=2",
    "dpm:order=3",
    "unipc:order=2",
    "unipc:order=3",
    "unipc:order=3,variant=bh1",
    "deis:order=2",
    "deis:order=3",
    "deis:order=3,axis=t",
    "ipndm:order=2",
    "ipndm:order=4",
    "pndm",
    "lms:order=4",
    "heun",
    "kdpm2",
    "kdpm2:pred=x0",
    "ddpm",
    "euler_ancestral",
    "sa_solver",
    "dpmpp:order=2,tau=1",
    "dpmpp_sde",
    "restart",
)
# No converged solution to compare with.
STOCHASTIC = ("ddpm", "euler_ancestral", "sa_solver", "dpmpp:order=2,tau=1", "dpmpp_sde", "restart")
GRID_NAMES = (*GRIDS, "gits")
_KARRAS = {"use_karras_sigmas": True}
_LEADING = {"timestep_spacing": "leading"}
CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIM": ("DDIMScheduler", {}),
    "DDIM trailing": ("DDIMScheduler", {"timestep_spacing": "trailing"}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "KDPM2": ("KDPM2DiscreteScheduler", {}),
    "LMS": ("LMSDiscreteScheduler", {}),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "DPM++ 2M karras": ("DPMSolverMultistepScheduler", _KARRAS),
    "DPM++ 2M lu": ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}),
    "DPM++ 3M": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "DPM++ 2S": ("DPMSolverSinglestepScheduler", {}),
    "UniPC 2": ("UniPCMultistepScheduler", {}),
    "UniPC 3": ("UniPCMultistepScheduler", {"solver_order": 3}),
    "UniPC 3 karras": ("UniPCMultistepScheduler", {"solver_order": 3, **_KARRAS}),
    "DEIS 2": ("DEISMultistepScheduler", {}),
    "DEIS 3": ("DEISMultistepScheduler", {"solver_order": 3}),
    "DPM++ 2M leading": ("DPMSolverMultistepScheduler", _LEADING),
    "UniPC 3 leading": ("UniPCMultistepScheduler", {"solver_order": 3, **_LEADING}),
    "DEIS 3 leading": ("DEISMultistepScheduler", {"solver_order": 3, **_LEADING}),
    "SDE-DPM++ 2M": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "Euler ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "DDPM": ("DDPMScheduler", {}),
    "SA-Solver": ("SASolverScheduler", {}),
}
REFERENCE = "dpmpp:order=3,taylor=true,grid=lambda"
PROJECTIONS = 128
BOOTSTRAP = {"screen": 0, "report": 16}
TEACHERS = 32  # noises for the GITS trajectory


@dataclass(frozen=True)
class Job:
    """One ledger line to be: a sampler at one NFE on one set of noises."""

    problem: str
    phase: str
    sampler: str
    grid: str
    nfe: int

    @property
    def key(self) -> str:
        """What identifies the line."""
        return f"{self.problem}|{self.phase}|{self.sampler}|{self.grid}|{self.nfe}"


class Bench:
    """A problem with its noises and converged solutions, computed when first needed."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._solutions: dict[str, tuple[Tensor, Tensor]] = {}
        self._real: dict[int, Tensor] = {}

    def noises(self, phase: str) -> Tensor:
        """Start states of the phase."""
        seed, count = {"screen": (1, self.problem.screen), "report": (2, self.problem.report), "teacher": (3, TEACHERS)}[phase]
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, *self.problem.shape, generator=generator, dtype=torch.float64).to(self.problem.dtype)

    def solution(self, phase: str) -> tuple[Tensor, Tensor]:
        """Noises and where the probability-flow equation takes them."""
        if phase not in self._solutions:
            x = self.noises(phase)
            schedule = parse_recipe(REFERENCE).schedule(NOISE, self.problem.converged)
            self._solutions[phase] = x, sample(self.problem.denoiser, x, schedule, NOISE)
        return self._solutions[phase]

    @cached_property
    def trajectory(self) -> Trajectory:
        """Of the GITS teacher."""
        return teacher_trajectory(self.problem.denoiser, self.noises("teacher"), NOISE)

    @cached_property
    def cost(self) -> Tensor:
        """Of the GITS grid."""
        return gits_cost(self.trajectory)

    @cached_property
    def projections(self) -> Tensor:
        """(D, P) unit directions of the sliced distance."""
        generator = torch.Generator().manual_seed(4)
        raw = torch.randn(math.prod(self.problem.shape), PROJECTIONS, generator=generator, dtype=torch.float64)
        return raw / raw.norm(dim=0)

    def run(self, job: Job) -> dict[str, Any]:
        """Sample and measure: what the choice needs while screening, everything when reporting."""
        x, solution = self.solution(job.phase)
        if job.grid == "diffusers":
            out, calls, stochastic = self._diffusers(x, *CLASSES[job.sampler], job.nfe)
        else:
            out, calls, stochastic = self._recipe(x, job)
        result: dict[str, Any] = {} if calls == job.nfe else {"nfe_used": calls}
        if stochastic:
            return result | self.distance(out, BOOTSTRAP[job.phase])
        errors = (out - solution).double().flatten(1).square().mean(1)
        rmse = errors.mean().sqrt().item()
        result["rmse"] = _short(rmse)
        if job.phase == "screen":
            return result
        result["rmse_se"] = _short(errors.std().item() / math.sqrt(len(errors)) / 2 / max(rmse, 1e-12))
        return result | self.distance(out, BOOTSTRAP[job.phase])

    def _quantiles(self, n: int) -> Tensor:
        """(n, P) quantiles of the real samples along the projections."""
        if n not in self._real:
            levels = (torch.arange(n, dtype=torch.float64) + 0.5) / n
            self._real[n] = torch.quantile(self.problem.real.double().flatten(1) @ self.projections, levels, dim=0)
        return self._real[n]

    def distance(self, out: Tensor, draws: int = 0) -> dict[str, float | None]:
        """Sliced Wasserstein-2 distance to the real samples; with ``draws``, also its bootstrap standard error."""
        if not bool(out.isfinite().all()):
            return {"swd": None}
        projected = out.double().flatten(1) @ self.projections
        wanted = self._quantiles(len(out))
        generator = torch.Generator().manual_seed(5)
        picks = [torch.arange(len(out)), *torch.randint(len(out), (draws, len(out)), generator=generator)]
        values = [(projected[pick].sort(dim=0).values - wanted).square().mean().sqrt() for pick in picks]
        error = {"swd_se": _short(torch.stack(values[1:]).std().item())} if draws else {}
        return {"swd": _short(values[0].item()), **error}

    def _recipe(self, x: Tensor, job: Job) -> tuple[Tensor, int, bool]:
        if job.grid == "gits":
            schedule = gits(job.sampler, self.problem.denoiser, NOISE, x, job.nfe, trajectory=self.trajectory, cost=self.cost)
        else:
            text = f"{job.sampler}{',' if ':' in job.sampler else ':'}grid={job.grid}"
            schedule = parse_recipe(text).schedule(NOISE, job.nfe)
        generator = torch.Generator().manual_seed(6)
        return sample(self.problem.denoiser, x, schedule, NOISE, generator=generator), schedule.nfe, schedule.stochastic

    def _diffusers(self, x: Tensor, name: str, options: dict[str, Any], nfe: int) -> tuple[Tensor, int, bool]:
        """As a pipeline would run it, at the most steps that the evaluations allow."""
        for steps in range(nfe, 0, -1):
            scheduler = getattr(diffusers, name).from_config(CONFIG, **options)
            scheduler.set_timesteps(steps)
            if len(scheduler.timesteps) <= nfe:
                break
        stochastic = "sde" in str(options) or name in ("EulerAncestralDiscreteScheduler", "DDPMScheduler", "SASolverScheduler")
        noise = {"generator": torch.Generator().manual_seed(6)} if stochastic else {}
        state = x * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            model_input = scheduler.scale_model_input(state, timestep)
            t = NOISE.t_of_timestep(timestep)
            alpha, sigma = (value.item() for value in NOISE.alpha_sigma(t))
            eps = (model_input - alpha * self.problem.denoiser(model_input.to(x), t)) / sigma
            state = scheduler.step(eps, timestep, state, **noise, return_dict=False)[0]
        return state.to(x), len(scheduler.timesteps), stochastic


def _short(value: float) -> float | None:
    """Five digits; None where the sampler has diverged."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def screen_jobs(name: str) -> Iterator[Job]:
    """Everything, on the noises that choose."""
    for nfe in NFES:
        for text in RECIPES:
            for grid in GRID_NAMES:
                yield Job(name, "screen", text, grid, nfe)


def report_jobs(name: str, ledger: dict[str, dict[str, Any]]) -> Iterator[Job]:
    """The chosen grid of every recipe, and diffusers' classes, on the noises that report."""
    for nfe in NFES:
        for label in CLASSES:
            yield Job(name, "report", label, "diffusers", nfe)
        for text in RECIPES:
            grid = chosen_grid(ledger, name, text, nfe)
            if grid is not None:
                yield Job(name, "report", text, grid, nfe)


def chosen_grid(ledger: dict[str, dict[str, Any]], name: str, text: str, nfe: int) -> str | None:
    """The grid that was best on the screening noises: by RMSE, or by distance for recipes that draw noise."""
    entries = {grid: ledger.get(Job(name, "screen", text, grid, nfe).key, {}) for grid in GRID_NAMES}
    measure = "swd" if text in STOCHASTIC else "rmse"
    known = {grid: entry[measure] for grid, entry in entries.items() if entry.get(measure) is not None}
    return min(known, key=known.__getitem__, default=None)


def read_ledger(path: Path) -> dict[str, dict[str, Any]]:
    """Lines by key; a line that an interruption cut off is dropped."""
    lines = path.read_text().splitlines() if path.is_file() else []
    ledger = {}
    for i, line in enumerate(lines):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            if i < len(lines) - 1:
                raise ValueError(f"{path}: line {i + 1} is not JSON") from None
            path.write_text("".join(f"{line}\n" for line in lines[:-1]))
            break
        ledger[entry.pop("key")] = entry
    return ledger


def settle(bench: Bench, jobs: list[Job], ledger: dict[str, dict[str, Any]], path: Path, label: str) -> None:
    """Run the jobs that the ledger lacks."""
    todo = [job for job in jobs if job.key not in ledger]
    with path.open("a") as file, torch.no_grad():
        for job in track(todo, f"{bench.problem.name} {label}", disable=not todo):
            try:
                entry = bench.run(job)
            except ValueError as error:  # an NFE or a grid that the recipe cannot use
                entry = {"error": str(error)}
            ledger[job.key] = entry
            file.write(json.dumps({"key": job.key, **entry}, separators=(",", ":")) + "\n")
            file.flush()


def run(data: Path | None, path: Path, only: list[str]) -> None:
    """Run what is missing."""
    torch.set_num_threads(1)
    path.parent.mkdir(parents=True, exist_ok=True)
    available = problems(data)
    if unknown := set(only) - set(available):
        raise SystemExit(f"unknown problems {', '.join(sorted(unknown))}; with these options there are: {', '.join(available)}")
    if data is None:
        print("without --data: the two CIFAR-10 problems are skipped")
    ledger = read_ledger(path)
    for name, build in available.items():
        if only and name not in only:
            continue
        bench = Bench(build())
        settle(bench, list(screen_jobs(name)), ledger, path, "screen")
        settle(bench, list(report_jobs(name, ledger)), ledger, path, "report")
        floor = Job(name, "report", "converged", "-", bench.problem.converged)
        if floor.key not in ledger:
            with torch.no_grad(), path.open("a") as file:
                entry = bench.distance(bench.solution("report")[1], BOOTSTRAP["report"])
                entry |= {"title": bench.problem.title, "about": bench.problem.about}
                entry |= {"screen": bench.problem.screen, "report": bench.problem.report}
                file.write(json.dumps({"key": floor.key, **entry}, separators=(",", ":")) + "\n")


def main() -> None:
    """Parse and go."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--ledger", type=Path, default=Path(__file__).parent / "results" / "solvers.jsonl")
    parser.add_argument("--only", nargs="*", default=[])
    args = parser.parse_args()
    if args.command == "run":
        return run(args.data, args.ledger, args.only)
    from solver_report import write_page

    write_page(read_ledger(args.ledger))


if __name__ == "__main__":
    main()

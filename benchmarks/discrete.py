"""Discrete samplers at equal network evaluations: every transition, the schedules to beat, learned tables.

    python benchmarks/discrete.py exact  --work DIR      # enumerable laws: KL, TV, NLL gap, entropy gap
    python benchmarks/discrete.py chains --work DIR      # Markov chains of 6 symbols, 32 sites: held-out 4-gram KL
    python benchmarks/discrete.py sudoku --work DIR      # 4x4 sudoku with a trained network
    python benchmarks/discrete.py digits --work DIR      # the shipped digit models against held-out digits
    python benchmarks/discrete.py text   --work DIR --data tinyshakespeare.txt
    python benchmarks/discrete.py cost   --work DIR      # overhead of a learned sampler, size of its file
    python benchmarks/discrete_page.py   --work DIR      # all results so far as docs/discrete.md's tables

Every cell is a line of DIR/cells.jsonl and is not computed again, so a run continues where it stopped.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from discrete_cells import PLAIN, PROCESSES, Cells, Subject, fit, learned_knobs, seeded
from discrete_networks import BASES, cost, digits, sudoku, text
from discrete_tasks import entropy_bound_table
from torch import Tensor

from distill import FitSettings, Teacher, exact_scores, sampled_scores
from samplers.discrete import (
    DiscreteTable,
    MarkovModel,
    Process,
    TabularModel,
    countdown_chain,
    exact_law,
    jump_grid,
    one_token_law,
    optimal_count_table,
    parity_law,
    random_chain,
    random_mixture,
)

SAMPLED = FitSettings(budget=140, samples=1000, judged=4000, teacher=Teacher(samples=6000, nfe=64))

# ---- enumerable laws ---------------------------------------------------------------------------------------------------


def exact(cells: Cells, args: argparse.Namespace) -> None:
    for seed in args.seeds:
        for task in args.tasks or ("markov", "mixture", "countdown", "parity", "token"):
            for name in args.processes:
                process = PROCESSES[name]({"parity": 2, "token": 15}.get(task, 3))
                ExactTask(cells, task, process, seed).measure()


def exact_law_of(task: str, process: Process, seed: int) -> Tensor:
    if task in ("markov", "countdown"):
        return (random_chain(process, seed=seed) if task == "markov" else countdown_chain(process)).law(5)
    return {
        "mixture": lambda: random_mixture(process, 5, seed=seed + 1).law(),
        "parity": lambda: parity_law(6),
        "token": lambda: one_token_law(15, seed),
    }[task]()


class ExactTask(Subject):
    """A law that is enumerated: the scores of a sampler are those of its own enumerated law."""

    def __init__(self, cells: Cells, task: str, process: Process, seed: int) -> None:
        self.task, self.law = task, exact_law_of(task, process, seed)
        model, head = TabularModel(self.law, process), f"exact/{task}/{process.name}/{seed}"
        draws = seed - 1 if task in ("countdown", "parity") else 0  # these laws have no seed: it sets the samples and fits
        super().__init__(cells, head, model, process, (0, self.law.ndim), 0, dict, draws)
        self.ids = model.sample(2000, seeded(5 + draws))

    def run(self, table: DiscreteTable) -> dict:
        return exact_scores(self.law, exact_law(self.model, self.process, self.law.ndim, table=table))

    def measure(self) -> None:
        model, process, name = self.model, self.process, self.process.name
        for nfe in (4, 8, 16, 24, 32):
            self.plain(nfe, PLAIN[name])
        if self.task == "token":  # Tweedie is exact there: nothing to learn
            return
        if name == "masked":  # from NFE = L on, fixed counts are exact
            self.cell(4, "fixed_count, optimal counts", lambda: optimal_count_table(model, process, self.ids, 4, seeded(0)))
            self.cell(4, "entropy_bound, mean NFE", lambda: entropy_bound_table(model, process, self.law.ndim, 4, rows=400))
            self.learn(4)
            self.learn_otherwise(4)
            return
        for nfe in (4, 8):
            grid = lambda nfe=nfe: tuple(jump_grid(model, process, self.ids[:400], nfe, seeded(0)))  # noqa: E731
            self.cell(nfe, "tweedie, jump grid", lambda grid=grid: DiscreteTable("uniform", "tweedie", grid()))
        for nfe in (4, 8, 16, 32):
            self.learn(nfe)
            self.learn_otherwise(nfe)

    def learn(self, nfe: int) -> None:
        """Exact gradients, from every target."""
        for target, given in {"law": self.law, "teacher": "teacher", "2000 samples": self.ids}.items():
            if self.cells.fits(nfe, target):
                self.fitted(nfe, f"exact_kl, {target}", "auto", "exact_kl", given, FitSettings(budget=100))

    def learn_otherwise(self, nfe: int) -> None:
        """All other objectives."""
        if not self.cells.fits(nfe, "otherwise"):
            return
        for objective, knobs in (("score_l2", ("rate",)), ("score_l2", ("t", "rate")), ("score_l2_block", ("t", "rate"))):
            label = objective + ("" if len(knobs) == 1 else ", t+rate")
            self.fitted(nfe, label, knobs, objective, self.law, FitSettings())
        for objective in ("ngram_kl", "mmd", "tv_support"):
            for target, given in (("law", self.law), ("teacher", "teacher")):
                self.fitted(nfe, f"{objective}, {target}", learned_knobs(self.process.name), objective, given, SAMPLED)

    def fitted(
        self, nfe: int, label: str, knobs: str | tuple, objective: str, given: Tensor | str, settings: FitSettings
    ) -> None:
        args = (self.model, self.process, self.law.ndim, nfe, knobs, objective, given, self.seed)
        settings = replace(settings, teacher=replace(settings.teacher, seed=1 + self.seed))
        self.cell(nfe, f"learned {label}", lambda: fit(*args, settings=settings))


# ---- chains of 32 sites ------------------------------------------------------------------------------------------------


def chains(cells: Cells, args: argparse.Namespace) -> None:
    for seed in args.seeds:
        for task in args.tasks or ("markov", "countdown"):
            for name in args.processes:
                process = PROCESSES[name](6)
                chain = random_chain(process, seed=seed) if task == "markov" else countdown_chain(process)
                chain_task(cells, f"chains/{task}/{name}/{seed}", chain, seed)


def chain_task(cells: Cells, head: str, chain: MarkovModel, seed: int) -> None:
    process, name = chain.process, chain.process.name
    truth, fresh = chain.sample(8000, 32, seeded(1000 + seed)), chain.sample(8000, 32, seeded(2000 + seed))

    def judge(ids: Tensor) -> dict:
        nll = float(-chain.log_prob(ids).mean()) / 32
        return sampled_scores(ids, fresh, ("4gram", "lag4"), 6) | {"nll_gap": nll - chain.entropy(32) / 32}

    subject = Subject(cells, head, chain, process, (4000, 32), 3000 + seed, judge, seed)
    if subject.due(0, "fresh data"):
        cells.put(judge(chain.sample(4000, 32, seeded(77 + seed))))
    for nfe in (4, 8, 16, 32):
        subject.plain(nfe, [*PLAIN[name], *(["confidence:noise=4"] if name == "masked" else [])])
        baselines(subject, nfe, truth)
    subject.plain(24, BASES[name][:1])
    for nfe in (4, 8, 16, 32) if name == "uniform" else (4, 8, 16):  # fixed counts at NFE = L are exact
        for target, given in (("data", truth), ("teacher", "teacher")):
            folder = cells.work / "fits" / head.replace("/", "-") / target
            teacher = Teacher(samples=6000, nfe=64 if name == "uniform" else 32)
            settings = FitSettings(budget=196, samples=500, judged=3000, folder=folder, teacher=teacher)
            subject.knobs = "auto" if nfe <= 8 else ""
            subject.learned(nfe, "ngram_kl", target, given, settings)
    if seed == 1 and cells.fits(8, "otherwise"):  # the printed objective, and with its perturbed starts
        for label, relax in (("learned score_l2", 0.0), ("learned score_l2, relaxed", 0.05)):
            args = (chain, process, 32, 8, ("rate",), "score_l2", "teacher", seed)
            settings = FitSettings(judged=1000, relax=relax, teacher=Teacher(samples=1000, nfe=32))
            subject.cell(8, label, lambda args=args, settings=settings: fit(*args, settings=settings))


def baselines(subject: Subject, nfe: int, truth: Tensor) -> None:
    """Training-free schedules that adapt to the model."""
    model, process = subject.model, subject.process
    if process.name == "masked":
        make = lambda: optimal_count_table(model, process, truth[:1000], nfe, seeded(0))  # noqa: E731
        subject.cell(nfe, "fixed_count, optimal counts", make)
        subject.bound(nfe, rows=60)
    elif nfe <= 16:
        grid = lambda: tuple(jump_grid(model, process, truth[:200], nfe, seeded(0)))  # noqa: E731
        subject.cell(nfe, "tweedie, jump grid", lambda: DiscreteTable("uniform", "tweedie", grid()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"exact": exact, "chains": chains, "sudoku": sudoku, "digits": digits, "text": text, "cost": cost}
    parser.add_argument("part", choices=[*parts])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="text: the file the character model was trained on")
    parser.add_argument("--processes", nargs="+", choices=[*PROCESSES], default=["uniform", "masked"])
    parser.add_argument("--tasks", nargs="+", help="exact, chains: only these laws")
    parser.add_argument("--fit-nfe", nargs="+", type=int, help="fit only tables of these evaluations in this run")
    parser.add_argument(
        "--fit-target",
        nargs="+",
        help="fit only to these targets in this run: law, data, teacher, otherwise (exact: other objectives)",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args()
    torch.set_num_threads(1)
    parts[args.part](Cells(args.work, args.fit_nfe, args.fit_target), args)


if __name__ == "__main__":
    main()

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
import json
import time
import warnings
from pathlib import Path

import torch
from discrete_tasks import digit_scores, judge_text, sudoku_network, text_data

from distill import FitSettings, Teacher, exact_scores, fit_discrete_sampler, sampled_scores
from samplers.discrete import (
    DiscreteTable,
    MarkovModel,
    MaskedProcess,
    Model,
    Process,
    TabularModel,
    UniformProcess,
    countdown_chain,
    exact_law,
    is_sudoku,
    jump_grid,
    one_token_law,
    optimal_count_table,
    parity_law,
    random_chain,
    random_mixture,
    sample_discrete,
    sudoku_grids,
)
from samplers.reference import binary_digits, load_tokens

PROCESSES = {"masked": MaskedProcess, "uniform": UniformProcess}
PLAIN = {
    "masked": ["euler", "tau", "remdm", "theta_trapezoidal", "theta_rk2", "fixed_count", "confidence"],
    "uniform": ["euler", "tau", "tweedie", "theta_trapezoidal", "theta_rk2"],
}


CHAIN_BASES = {"masked": ["fixed_count", "optimal counts", "confidence", "confidence:noise=4"], "uniform": ["tweedie"]}


class Cells:
    """Results by key, one JSON line each: ``if cells.due(key): cells.put(scores)``."""

    def __init__(self, work: Path) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.path, self.work, self.key, self.started = work / "cells.jsonl", work, "", 0.0
        self.known = {json.loads(line)["key"] for line in self.path.read_text().splitlines()} if self.path.exists() else set()

    def due(self, key: str) -> bool:
        self.key, self.started = key, time.process_time()
        return key not in self.known

    def put(self, found: dict) -> None:
        found = {"key": self.key} | found | {"cpu_seconds": round(time.process_time() - self.started, 2)}
        with self.path.open("a") as file:
            file.write(json.dumps(found) + "\n")
        self.known.add(self.key)
        print(self.key, {k: round(v, 4) for k, v in found.items() if isinstance(v, float)}, flush=True)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fit(*args: object, **kwargs: object) -> DiscreteTable:
    """A fit whose refusal to call a table better is a result, not a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no improvement|the steps of LSD")
        return fit_discrete_sampler(*args, **kwargs)


# ---- enumerable laws ---------------------------------------------------------------------------------------------------


def exact(cells: Cells, args: argparse.Namespace) -> None:
    for seed in args.seeds:
        for task in ("markov", "mixture", "countdown", "parity", "token"):
            if seed == args.seeds[0] or task not in ("countdown", "parity"):  # these two have no seed
                for name in PROCESSES:
                    exact_task(cells, task, name, seed)


def exact_law_of(task: str, process: Process, seed: int) -> torch.Tensor:
    if task in ("markov", "countdown"):
        return (random_chain(process, seed=seed) if task == "markov" else countdown_chain(process)).law(5)
    return {
        "mixture": lambda: random_mixture(process, 5, seed=seed + 1).law(),
        "parity": lambda: parity_law(6),
        "token": lambda: one_token_law(15, seed),
    }[task]()


def exact_task(cells: Cells, task: str, name: str, seed: int) -> None:
    process = PROCESSES[name]({"parity": 2, "token": 15}.get(task, 3))
    law = exact_law_of(task, process, seed)
    model, length = TabularModel(law, process), law.ndim
    head = f"exact/{task}/{name}/{seed}"
    for nfe in (4, 8, 16, 24, 32):
        for base in PLAIN[name]:
            if cells.due(f"{head}/{nfe}/{base}"):
                cells.put(exact_scores(law, exact_law(model, process, length, nfe, base)))
    for nfe in (4, 8):
        if task != "token" and (name == "uniform" or nfe < length):
            exact_learned(cells, f"{head}/{nfe}", model, law, nfe, seed)


def exact_learned(cells: Cells, head: str, model: TabularModel, law: torch.Tensor, nfe: int, seed: int) -> None:
    process, length = model.process, law.ndim
    ids = model.sample(2000, seeded(5))
    tables = {"law": law} if seed != 1 else {"law": law, "teacher": "teacher", "2000 samples": ids}
    for target, given in tables.items():
        if cells.due(f"{head}/learned exact_kl, {target}"):
            table = fit(model, process, length, nfe, objective="exact_kl", target=given, settings=FitSettings(budget=80))
            cells.put(exact_scores(law, exact_law(model, process, length, table=table)) | {"table": table.to_dict()})
    if seed == 1 and cells.due(f"{head}/learned score_l2"):
        table = fit(model, process, length, nfe, objective="score_l2", target=law)
        cells.put(exact_scores(law, exact_law(model, process, length, table=table)) | {"table": table.to_dict()})
    if seed == 1 and process.name == "uniform" and cells.due(f"{head}/tweedie, jump grid"):
        table = DiscreteTable("uniform", "tweedie", tuple(jump_grid(model, process, ids[:400], nfe, seeded(0))))
        cells.put(exact_scores(law, exact_law(model, process, length, table=table)))


# ---- chains of 32 sites ------------------------------------------------------------------------------------------------


def chains(cells: Cells, args: argparse.Namespace) -> None:
    for seed in args.seeds:
        for task in ("markov", "countdown"):
            for name in PROCESSES:
                process = PROCESSES[name](6)
                chain = random_chain(process, seed=seed) if task == "markov" else countdown_chain(process)
                chain_task(cells, f"chains/{task}/{name}/{seed}", chain, seed, teacher=seed == args.seeds[0])


def chain_task(cells: Cells, head: str, chain: MarkovModel, seed: int, *, teacher: bool) -> None:
    process = chain.process
    name = process.name
    truth, fresh = chain.sample(8000, 32, seeded(1000 + seed)), chain.sample(4000, 32, seeded(2000 + seed))

    def score(ids: torch.Tensor) -> dict:
        nll = float(-chain.log_prob(ids).mean()) / 32
        return sampled_scores(ids, fresh, ("4gram", "lag4"), 6) | {"nll_gap": nll - chain.entropy(32) / 32}

    def run(table: DiscreteTable) -> dict:
        return score(sample_discrete(chain, process, (4000, 32), table=table, generator=seeded(3000 + seed)))

    if cells.due(f"{head}/0/fresh data"):
        cells.put(score(chain.sample(4000, 32, seeded(77))))
    for nfe in (4, 8, 16, 24):
        for base in CHAIN_BASES[name]:
            if cells.due(f"{head}/{nfe}/{base}"):
                optimal = base == "optimal counts"
                table = optimal_count_table(chain, process, truth[:1000], nfe, seeded(0)) if optimal else None
                cells.put(run(table or DiscreteTable.plain(name, base, nfe)))
    given = {"data": truth, "teacher": "teacher"} if teacher else {"data": truth}
    for nfe in (4, 8):
        for target, ids in given.items():
            if cells.due(f"{head}/{nfe}/learned ngram_kl, {target}"):
                table = chain_fit(chain, nfe, ids, seed, cells.work / "fits" / head.replace("/", "-") / target)
                cells.put(run(table) | {"table": table.to_dict()})


def chain_fit(chain: MarkovModel, nfe: int, target: object, seed: int, folder: Path) -> DiscreteTable:
    name = chain.process.name
    teacher = Teacher(samples=4000, nfe=64 if name == "uniform" else 32)
    settings = FitSettings(budget=196, samples=500, judged=3000, folder=folder, teacher=teacher)
    knobs = ("t", "temp") if name == "uniform" else ("count", "temp")
    return fit(chain, chain.process, 32, nfe, knobs, "ngram_kl", target, seed, settings=settings)


# ---- trained networks --------------------------------------------------------------------------------------------------


def sudoku(cells: Cells, args: argparse.Namespace) -> None:
    truth = sudoku_grids()[torch.randint(288, (6000,), generator=seeded(9))]
    for name in args.processes:
        process = PROCESSES[name](4)
        model = sudoku_network(process, cells.work)
        knobs = ("t", "temp") if name == "uniform" else ("count", "temp")
        for nfe in (4, 8, 24):
            for base in ["tweedie", "euler"] if name == "uniform" else ["fixed_count", "confidence"]:
                if cells.due(f"sudoku/network/{name}/0/{nfe}/{base}"):
                    cells.put(sudoku_scores(model, DiscreteTable.plain(name, base, nfe), process, 0))
        for seed in args.seeds:
            for nfe in (4, 8):
                if cells.due(f"sudoku/network/{name}/{seed}/{nfe}/learned tv_support, data"):
                    settings = FitSettings(budget=280, samples=1500, judged=3000, batch=1500, holdout=("lag1", "lag4"))
                    table = fit(model, process, 16, nfe, knobs, "tv_support", truth, seed, settings=settings)
                    cells.put(sudoku_scores(model, table, process, seed) | {"table": table.to_dict()})


def sudoku_scores(model: Model, table: DiscreteTable, process: Process, seed: int) -> dict:
    ids = sample_discrete(model, process, (10_000, 16), table=table, generator=seeded(400 + seed))
    good = is_sudoku(ids)
    both, counts = torch.unique(ids[good], dim=0, return_counts=True)
    share = counts.double() / len(ids)
    among = share / share.sum()
    return {
        "valid": float(good.double().mean()),
        "tv": 1.0 - float(share.clamp(max=1 / 288).sum()),
        "kl_among_valid": float((among * (among * 288).log()).sum()),
        "grids": float(len(both)),
    }


def digits(cells: Cells, args: argparse.Namespace) -> None:
    if cells.due("digits/network/uniform/0/0/training digits"):
        cells.put(digit_scores(binary_digits("train")))
    for name in args.processes:
        model = load_tokens(f"binary-digits-{name}")
        knobs = ("t", "temp") if name == "uniform" else ("count", "temp")
        for nfe in (4, 8, 16, 24, 64):
            for base in ["tweedie"] if name == "uniform" else ["fixed_count", "confidence:noise=4"]:
                if cells.due(f"digits/network/{name}/0/{nfe}/{base}"):
                    table = DiscreteTable.plain(name, base, nfe)
                    cells.put(
                        digit_scores(sample_discrete(model, model.process, (2000, 64), table=table, generator=seeded(500)))
                    )
        for seed in args.seeds:
            for nfe in (4, 8):
                if cells.due(f"digits/network/{name}/{seed}/{nfe}/learned mmd, teacher"):
                    settings = FitSettings(
                        budget=140,
                        samples=800,
                        judged=3000,
                        batch=1000,
                        holdout=("patch3w8",),
                        folder=cells.work / "fits" / f"digits-{name}",
                        teacher=Teacher(nfe=64, samples=6000),
                    )
                    table = fit(model, model.process, 64, nfe, knobs, "mmd", "teacher", seed, settings=settings)
                    x = sample_discrete(model, model.process, (2000, 64), table=table, generator=seeded(500 + seed))
                    notes = {"table": table.to_dict(), "fit_seconds": table.provenance["seconds"]}
                    cells.put(digit_scores(x) | notes)


def text(cells: Cells, args: argparse.Namespace) -> None:
    if args.data is None:
        raise SystemExit("text needs --data, the file the character model was trained on")
    model = load_tokens(Path(__file__).parent / "models" / "characters")
    process, length = model.process, model.seq_len
    train, held_out = text_data(args.data, model.config["symbols"], length)
    judge = judge_text(train, held_out)
    if cells.due("text/characters/masked/0/0/held-out text"):
        cells.put(judge(held_out[:400]))

    def run(table: DiscreteTable) -> dict:
        generator = seeded(600)
        parts = [sample_discrete(model, process, (100, length), table=table, generator=generator) for _ in range(4)]
        return judge(torch.cat(parts))

    for nfe in (4, 8, 16, 32, 64):
        for base in ("fixed_count", "confidence:noise=4"):
            if cells.due(f"text/characters/masked/0/{nfe}/{base}"):
                cells.put(run(DiscreteTable.plain("masked", base, nfe)))
        if cells.due(f"text/characters/masked/0/{nfe}/optimal counts"):
            cells.put(run(optimal_count_table(model, process, train[:100], nfe, seeded(0))))
    for nfe in (4, 8, 16):
        if cells.due(f"text/characters/masked/0/{nfe}/learned ngram_kl, data"):
            settings = FitSettings(budget=56, samples=150, judged=300, batch=100, holdout=("lag1", "lag4"))
            table = fit(model, process, length, nfe, ("count", "temp"), "ngram_kl", train[:6000], settings=settings)
            cells.put(run(table) | {"table": table.to_dict()})


def cost(cells: Cells, args: argparse.Namespace) -> None:
    if not cells.due("cost/digits/uniform/0/8/overhead of temp"):
        return
    model = load_tokens("binary-digits-uniform")
    plain = DiscreteTable.plain("uniform", "tweedie", 8)
    learned = DiscreteTable("uniform", "tweedie", plain.times, temp=tuple(1.0 + 0.1 * k for k in range(8)))
    spent = {"plain": float("inf"), "learned": float("inf")}
    for turn in range(20):
        for label, table in (("plain", plain), ("learned", learned)):
            started = time.process_time()
            sample_discrete(model, model.process, (500, 64), table=table, generator=seeded(turn))
            spent[label] = min(spent[label], time.process_time() - started)
    cells.put({"overhead": spent["learned"] / spent["plain"] - 1.0, "bytes": float(len(json.dumps(learned.to_dict())))})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"exact": exact, "chains": chains, "sudoku": sudoku, "digits": digits, "text": text, "cost": cost}
    parser.add_argument("part", choices=[*parts])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--processes", nargs="+", choices=[*PROCESSES], default=["uniform", "masked"], help="sudoku, digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args()
    torch.set_num_threads(1)
    parts[args.part](Cells(args.work), args)


if __name__ == "__main__":
    main()

"""The parts of the discrete benchmark with trained networks: sudoku, binary digits, text, and what a learned sampler costs."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median

import torch
from discrete_cells import PROCESSES, Cells, Subject, fit, learned_knobs, seeded
from discrete_tasks import digit_scores, judge_text, sudoku_network, sudoku_scores, text_data

from distill import FitSettings, Teacher
from samplers.discrete import (
    DiscreteTable,
    optimal_count_table,
    optimal_counts,
    resample_table,
    reveal_losses,
    sample_discrete,
    sudoku_grids,
)
from samplers.reference import binary_digits, load_tokens

BASES = {"uniform": ["tweedie", "euler"], "masked": ["fixed_count", "confidence", "confidence:noise=4"]}


def sudoku(cells: Cells, args: argparse.Namespace) -> None:
    truth = sudoku_grids()[torch.randint(288, (6000,), generator=seeded(9))]
    for name in args.processes:
        process = PROCESSES[name](4)
        model = sudoku_network(process, cells.work)
        for seed in args.seeds:
            head = f"sudoku/network/{name}/{seed}"
            subject = Subject(cells, head, model, process, (10_000, 16), 400 + seed, sudoku_scores, seed)
            for nfe in (4, 8, 16, 24, 32) if name == "uniform" else (4, 8, 16):
                subject.plain(nfe, BASES[name])
                if name == "masked" and seed == 1:
                    subject.bound(nfe, rows=300)
            sudoku_learned(subject, truth)


def sudoku_learned(subject: Subject, truth: torch.Tensor) -> None:
    """Fits to grids and to the teacher; under masked noise one token at a time is NFE 16, and nothing is left to learn."""
    uniform = subject.process.name == "uniform"
    more = [(16, "data"), (16, "teacher"), (32, "data")] if uniform else []
    for nfe, target in [(4, "data"), (8, "data"), (4, "teacher"), (8, "teacher"), *more]:
        settings = FitSettings(
            budget=280 if nfe <= 8 else 140,
            samples=1500,
            judged=3000,
            batch=1500,
            holdout=("lag1", "lag4"),
            teacher=Teacher(nfe=64 if uniform else 16, samples=6000),
        )
        subject.learned(nfe, "tv_support", target, truth if target == "data" else target, settings)
    if subject.seed == 1 and subject.cells.fits(4, "otherwise"):
        sudoku_otherwise(subject, truth)


def sudoku_otherwise(subject: Subject, truth: torch.Tensor) -> None:
    """The other objectives at NFE 4, from the grids and from the teacher; the printed one knows only the teacher."""
    uniform = subject.process.name == "uniform"
    teacher = Teacher(nfe=64 if uniform else 16, samples=6000)
    for objective in ("ngram_kl", "mmd"):
        for target, given in (("data", truth), ("teacher", "teacher")):
            settings = FitSettings(budget=140, samples=1500, judged=3000, batch=1500, teacher=teacher)
            args = (subject.model, subject.process, 16, 4, learned_knobs(subject.process.name), objective, given, 1)
            subject.cell(
                4, f"learned {objective}, {target}", lambda args=args, settings=settings: fit(*args, settings=settings)
            )
    args = (subject.model, subject.process, 16, 4, ("rate",), "score_l2", "teacher", 1)
    subject.cell(4, "learned score_l2", lambda: fit(*args, settings=FitSettings(judged=3000, teacher=teacher)))


def digits(cells: Cells, args: argparse.Namespace) -> None:
    train = binary_digits("train")
    for name in args.processes:
        if cells.due(f"digits/network/{name}/0/0/training digits"):
            cells.put(digit_scores(train))
    for seed in args.seeds:
        for name in args.processes:
            model, head = load_tokens(f"binary-digits-{name}"), f"digits/network/{name}/{seed}"
            subject = Subject(cells, head, model, model.process, (5000, 64), 500 + seed, digit_scores, seed)
            for nfe in (4, 8, 16, 24, 64):
                subject.plain(nfe, BASES[name] if nfe <= 16 and seed == 1 else BASES[name][:1])
                if name == "masked" and nfe <= 16 and seed == 1:
                    args_ = (model, model.process, train[:500], nfe, seeded(0))
                    subject.cell(nfe, "fixed_count, optimal counts", lambda args_=args_: optimal_count_table(*args_))
                    subject.bound(nfe, rows=200)
            for nfe, target in ((4, "data"), (4, "teacher"), (8, "data"), (8, "teacher"), (16, "data")):
                settings = FitSettings(
                    budget=140,
                    samples=800,
                    judged=3000,
                    batch=1000,
                    holdout=("patch3w8",),
                    folder=cells.work / "fits" / f"digits-{name}-{target}",
                    teacher=Teacher(nfe=64, samples=6000),
                )
                subject.learned(nfe, "mmd", target, train if target == "data" else target, settings)


def text(cells: Cells, args: argparse.Namespace) -> None:
    if args.data is None:
        raise SystemExit("text needs --data, the file the character model was trained on")
    model = load_tokens(Path(__file__).parent / "models" / "characters")
    process, length = model.process, model.seq_len
    whole, train, other, held_out = text_data(args.data, model.config["symbols"], length)
    judge, rows = judge_text(whole, held_out, process.vocab), 100
    losses = reveal_losses(model, process, train[:100], seeded(0), stride=4)
    for seed in args.seeds:
        head = f"text/characters/masked/{seed}"
        subject = Subject(cells, head, model, process, (rows, length), 600 + seed, judge, seed)
        if subject.due(0, "held-out text"):
            cells.put(judge(other[rows * (seed - 1) : rows * seed]))
        for nfe in (4, 8, 16, 32) if seed == 1 else (4, 8, 16):
            subject.plain(nfe, ("fixed_count", "euler", "confidence:noise=4"))
            times, counts = DiscreteTable.plain("masked", "fixed_count", nfe).times, tuple(optimal_counts(losses, nfe))
            table = DiscreteTable("masked", "fixed_count", times, count=counts)
            subject.cell(nfe, "fixed_count, optimal counts", lambda table=table: table)
            if nfe <= 16 and seed == 1:
                subject.bound(nfe, rows=16)
        subject.plain(24, ("fixed_count",))
        if seed == 1:
            subject.plain(64, ("fixed_count",))
        text_learned(subject, train)


def text_learned(subject: Subject, train: torch.Tensor) -> None:
    """Fits at few evaluations; the table of 8 is interpolated to more without another fit."""
    for nfe, target in ((4, "data"), (8, "data"), (16, "data"), (4, "teacher"), (8, "teacher")):
        settings = FitSettings(
            budget=84,
            samples=64,
            judged=300,
            batch=100,
            holdout=("lag4", "lag6"),
            folder=subject.cells.work / "fits" / f"text-{target}",
            teacher=Teacher(nfe=32, samples=500),
        )
        subject.learned(nfe, "ngram_kl", target, train[:6000] if target == "data" else target, settings)
    found = subject.cells.known.get(f"{subject.head}/8/learned ngram_kl, data")
    if found and not found["refused"]:
        table = DiscreteTable.from_dict(found["table"])
        for nfe in (16, 32):
            subject.cell(nfe, "learned at 8, interpolated", lambda nfe=nfe: resample_table(table, nfe))


def cost(cells: Cells, args: argparse.Namespace) -> None:
    """Processor time of learned samplers over their bases', in pairs of runs in turn: the median of the ratios."""
    counts = (1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0, 15.0)
    for name, base, knob in (("uniform", "tweedie", "temp"), ("uniform", "euler", "rate"), ("masked", "fixed_count", "temp")):
        if not cells.due(f"cost/digits/{name}/0/8/{knob} over {base}"):
            continue
        model = load_tokens(f"binary-digits-{name}")
        plain = DiscreteTable.plain(name, base, 8)
        numbers = {knob: tuple(1.1 + 0.1 * k for k in range(8))} | ({"count": counts} if name == "masked" else {})
        learned = DiscreteTable(name, base, plain.times, **numbers)
        ratios = []
        for turn in range(40):
            spent = {}
            for label, table in (("plain", plain), ("learned", learned))[:: 1 if turn % 2 else -1]:
                started = time.process_time()
                sample_discrete(model, model.process, (500, 64), table=table, generator=seeded(turn))
                spent[label] = time.process_time() - started
            ratios.append(spent["learned"] / spent["plain"] - 1.0)
        cells.put({"overhead": median(ratios), "bytes": float(len(json.dumps(learned.to_dict())))})

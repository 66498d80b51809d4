"""Networks and judges of the discrete benchmark: the sudoku network, scores of digits, and the character judge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import exp, log
from pathlib import Path

import torch
from torch import Tensor

from distill import sampled_scores
from distill.statistics import HammingMMD
from samplers.discrete import MaskedProcess, Model, UniformProcess, from_logits, sudoku_grids
from samplers.reference import binary_digits
from samplers.reference.token_training import TokenTraining, train_tokens
from samplers.reference.tokens import TokenMLP, load_network, save_network


def sudoku_network(process: MaskedProcess | UniformProcess, work: Path) -> Model:
    """A residual MLP trained on all 288 grids, kept in ``work``."""
    folder, uniform = work / f"sudoku-{process.name}", process.name == "uniform"
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        grids = sudoku_grids()
        network = TokenMLP(vocab=4, seq_len=16, width=192, depth=3, time=uniform)
        config = TokenTraining(process=process.name, steps=3000, batch=256, lr=2e-3, save_every=500)

        def draw(batch: int, generator: torch.Generator) -> Tensor:
            return grids[torch.randint(288, (batch,), generator=generator)]

        save_network(train_tokens(network, draw, config, work / f"sudoku-{process.name}.checkpoint"), folder)
    return from_logits(load_network(folder)[0], process, time="noise_ratio" if uniform else "none")


def digit_scores(ids: Tensor) -> dict[str, float]:
    """Distances of binary digits (n, 64) from the held-out digits: kernel distance, 3x3 patches, entropy of patches."""
    test = binary_digits("test")
    found = sampled_scores(ids, test, ("patch3w8",), 2)
    return {"mmd_1e3": 1e3 * HammingMMD(test, 2)(ids), "patch_tv": found["patch3w8_tv"], "entropy_gap": found["entropy_gap"]}


def text_data(path: Path, symbols: str, length: int) -> tuple[Tensor, Tensor]:
    """Windows of the training nine tenths and of the held-out tenth, in random order."""
    lookup = {symbol: i for i, symbol in enumerate(symbols)}
    ids = torch.tensor([lookup[c] for c in path.read_text(encoding="utf-8")])
    cut, generator = len(ids) * 9 // 10, torch.Generator().manual_seed(0)
    parts = []
    for part, count in ((ids[:cut], 8000), (ids[cut:], 2000)):
        start = torch.randint(len(part) - length, (count, 1), generator=generator)
        parts.append(part[start + torch.arange(length)])
    return parts[0], parts[1]


def judge_text(train: Tensor, held_out: Tensor, order: int = 5) -> Callable[[Tensor], dict[str, float]]:
    """An independent judge: a character n-gram model with Witten-Bell smoothing, fitted to ``train`` (n, L).

    Scores: its perplexity per character, distinct 4-grams per window (diversity), and the gap of the unigram-to-pair block
    entropy to held-out text. Perplexity alone is gamed by repetition.
    """
    counts: list[dict[tuple[int, ...], Counter]] = [{} for _ in range(order)]
    for row in train.tolist():
        for i, symbol in enumerate(row):
            for n in range(min(order, i + 1)):
                counts[n].setdefault(tuple(row[i - n : i]), Counter())[symbol] += 1
    vocab = int(train.max()) + 1

    def probability(history: tuple[int, ...], symbol: int) -> float:
        p = 1.0 / vocab
        for n in range(min(order, len(history) + 1)):
            seen = counts[n].get(history[len(history) - n :])
            if seen is None:
                break
            total, kinds = sum(seen.values()), len(seen)
            p = (seen[symbol] + kinds * p) / (total + kinds)
        return p

    def score(ids: Tensor) -> dict[str, float]:
        rows = ids.tolist()
        logs = [
            -log(probability(tuple(row[max(0, i - order + 1) : i]), row[i])) for row in rows for i in range(order - 1, len(row))
        ]
        grams = {tuple(row[i : i + 4]) for row in rows[:400] for i in range(len(row) - 3)}
        total = sum(len(row) - 3 for row in rows[:400])
        found = sampled_scores(ids, held_out[: len(ids)], ("2gram", "lag4"), vocab)
        return {
            "perplexity": exp(sum(logs) / len(logs)),
            "distinct_4grams": len(grams) / total,
            "entropy_gap": found["entropy_gap"],
            "lag4_tv": found["lag4_tv"],
        }

    return score

"""Networks, baselines and judges of the discrete benchmark."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain
from math import exp, log
from pathlib import Path

import torch
from torch import Tensor

from distill import sampled_scores
from distill.statistics import HammingMMD
from samplers.discrete import (
    DiscreteTable,
    MaskedProcess,
    Model,
    UniformProcess,
    from_logits,
    is_sudoku,
    iterate_discrete,
    sudoku_grids,
)
from samplers.reference import binary_digits
from samplers.reference.token_training import TokenTraining, train_tokens
from samplers.reference.tokens import TokenMLP, load_network, save_network


def entropy_bound_table(model: Model, process: MaskedProcess, length: int, nfe: int, rows: int = 60) -> DiscreteTable:
    """Entropy-bound unmasking whose *average* number of evaluations is ``nfe``; a hard sequence may use twice as many.

    The bound is found by bisection on the model's own samples.
    """
    cap = min(2 * nfe, length)
    if nfe >= length:
        return DiscreteTable.plain("masked", "entropy_bound:bound=0", length)
    low, high = log(1e-3), log(length * log(process.vocab))
    for turn in range(9):
        middle = 0.5 * (low + high)
        table = DiscreteTable.plain("masked", f"entropy_bound:bound={exp(middle):.6g}", cap)
        generator = torch.Generator().manual_seed(turn)
        used = evaluations(model, process, process.prior((rows, length)), table, generator)[1]
        low, high = (middle, high) if used > nfe else (low, middle)
    return DiscreteTable.plain("masked", f"entropy_bound:bound={exp(0.5 * (low + high)):.6g}", cap)


def evaluations(
    model: Model, process: MaskedProcess, x: Tensor, table: DiscreteTable, generator: torch.Generator
) -> tuple[Tensor, float]:
    """Samples, and the mean number of evaluations at which a sequence still had a mask."""
    used = 0.0
    with torch.no_grad():
        for run in iterate_discrete(model, process, x, table, generator=generator):
            used += float((run.x == process.mask_id).any(-1).double().mean())
            x = run.x
    return x, used


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


def sudoku_scores(ids: Tensor) -> dict[str, float]:
    """Share of valid grids, distance from the uniform law over all 288, and how evenly the valid ones are spread."""
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


def digit_scores(ids: Tensor) -> dict[str, float]:
    """Distances of binary digits (n, 64) from the held-out digits: kernel distance, 3x3 patches, entropy of patches."""
    test = binary_digits("test")
    found = sampled_scores(ids, test, ("patch3w8",), 2)
    return {"mmd_1e3": 1e3 * HammingMMD(test, 2)(ids), "patch_tv": found["patch3w8_tv"], "entropy_gap": found["entropy_gap"]}


def text_data(path: Path, symbols: str, length: int) -> tuple[list[int], Tensor, Tensor, Tensor]:
    """The training nine tenths as one list; random windows of it, and of both halves of the held-out tenth."""
    lookup = {symbol: i for i, symbol in enumerate(symbols)}
    ids = torch.tensor([lookup[c] for c in path.read_text(encoding="utf-8")])
    cut, generator = len(ids) * 9 // 10, torch.Generator().manual_seed(0)
    parts = []
    half = (cut + len(ids)) // 2
    for part, count in ((ids[:cut], 8000), (ids[cut:half], 1000), (ids[half:], 1000)):
        start = torch.randint(len(part) - length, (count, 1), generator=generator)
        parts.append(part[start + torch.arange(length)])
    return ids[:cut].tolist(), *parts


class CharacterNgram:
    """An n-gram model with Witten-Bell interpolation: shares nothing with a diffusion network but the training text."""

    def __init__(self, rows: Sequence[Sequence[int]], vocab: int, order: int) -> None:
        """Count all histories of up to ``order`` - 1 characters."""
        self.vocab, self.order = vocab, order
        self.counts: list[dict[tuple[int, ...], Counter]] = [{} for _ in range(order)]
        for row in rows:
            for n, table in enumerate(self.counts):
                for i in range(n, len(row)):
                    table.setdefault(tuple(row[i - n : i]), Counter())[row[i]] += 1

    def probability(self, history: tuple[int, ...], symbol: int) -> float:
        """Probability of a character after a history."""
        p = 1.0 / self.vocab
        for n in range(min(self.order, len(history) + 1)):
            seen = self.counts[n].get(history[len(history) - n :])
            if seen is None:
                break
            total, kinds = seen.total(), len(seen)
            p = (seen[symbol] + kinds * p) / (total + kinds)
        return p

    def perplexity(self, rows: Sequence[Sequence[int]]) -> float:
        """Per character, of every character that has a full history within its row."""
        back = self.order - 1
        logs = [log(self.probability(tuple(row[i - back : i]), row[i])) for row in rows for i in range(back, len(row))]
        return exp(-sum(logs) / len(logs))


def judge_text(train: list[int], held_out: Tensor, vocab: int, order: int = 5) -> Callable[[Tensor], dict[str, float]]:
    """Scores of samples (n, L) by an n-gram model of the training text.

    ``perplexity`` under it; ``reverse_perplexity`` of held-out text under a 4-gram model of the samples, which repetition and
    missing variety make worse; ``entropy_gap``, of the mean entropy of a window's characters, nats, from held-out windows;
    ``distinct_4grams``, the share of 4-grams that occur once or first.
    """
    judge, real = CharacterNgram([train], vocab, order), held_out.tolist()
    entropy = _window_entropy(real)

    def score(ids: Tensor) -> dict[str, float]:
        rows = ids.tolist()
        grams = list(chain.from_iterable((tuple(row[i : i + 4]) for i in range(len(row) - 3)) for row in rows))
        return {
            "perplexity": judge.perplexity(rows),
            "reverse_perplexity": CharacterNgram(rows, vocab, 4).perplexity(real),
            "entropy_gap": _window_entropy(rows) - entropy,
            "distinct_4grams": len(set(grams)) / len(grams),
        }

    return score


def _window_entropy(rows: Sequence[Sequence[int]]) -> float:
    total = 0.0
    for row in rows:
        total -= sum(c / len(row) * log(c / len(row)) for c in Counter(row).values())
    return total / len(rows)

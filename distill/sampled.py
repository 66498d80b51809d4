"""Objectives that need nothing but samples, minimised by separable CMA-ES (Ros & Hansen 2008) over the few dozen numbers.

Candidates of one generation share their random numbers, every generation has new ones; the answer is the search's mean, not
the luckiest candidate. A journal of plain numbers lets an interrupted run continue: the search is replayed from the values.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from cmaes import SepCMA
from torch import Tensor

from .knobs import KnobSpace
from .statistics import (
    CELLS,
    HammingMMD,
    Statistic,
    objective_windows,
    support_law,
    total_variation,
    window_gap,
    window_law,
)
from .target import launched

SAMPLED = ("ngram_kl", "mmd", "tv_support")


def choose_objective(reference: Tensor, vocab: int) -> str:
    """Choose "tv_support" for few distinct sequences, n-grams where a pair table fits, else the kernel distance."""
    if len(torch.unique(reference, dim=0)) <= 0.1 * len(reference):
        return "tv_support"
    return "ngram_kl" if vocab**2 <= CELLS and reference.shape[1] > 1 else "mmd"


def statistic(name: str, reference: Tensor, vocab: int) -> Statistic:
    """An objective ids (n, L) -> float against reference ids (m, L); zero is perfect.

    Raises:
        ValueError: unknown name, or a support of more sequences than samples can fill.
    """
    if name == "ngram_kl":
        laws = {kind: window_law(reference, kind, vocab) for kind in objective_windows(vocab, reference.shape[1])}
        return lambda ids: sum(window_gap(law, ids, kind, vocab) for kind, law in laws.items())
    if name == "mmd":
        return HammingMMD(reference[:3000], vocab)
    if name == "tv_support":
        points = torch.unique(reference, dim=0)
        if len(points) > 0.5 * len(reference):
            raise ValueError(
                f"tv_support needs a law on few sequences: {len(points)} of {len(reference)} target sequences are distinct; "
                "use ngram_kl or mmd"
            )
        law = support_law(reference, points)
        return lambda ids: total_variation(law, support_law(ids, points))
    raise ValueError(f"unknown objective {name!r}; known: {', '.join(SAMPLED)}")


def fit_sampled(
    space: KnobSpace,
    draw: Callable[[Tensor, int], Tensor],
    score: Statistic,
    *,
    evaluations: int,
    population: int = 14,
    sigma: float = 0.3,
    seed: int = 0,
    journal: Path | None = None,
    label: str = "",
    progress: Callable[[int, int, float], None] | None = None,
) -> Tensor:
    """The mean vector (d,) after ``evaluations`` candidates, rounded up to whole generations.

    Args:
        space: the family of tables.
        draw: ``draw(vector, seed)`` -> ids (n, L) of the vector's table.
        score: the objective.
        evaluations: candidates in all.
        population: candidates per generation; processes of an ``accelerate launch`` share them.
        sigma: first width of the search.
        seed: of the search and of every generation's noise.
        journal: file that keeps the values.
        label: what is scored, and against what; a journal with another label is refused.
        progress: called with (generations done, generations, best value of the last).

    Raises:
        ValueError: the journal belongs to another search.
    """
    from accelerate.utils import gather_object

    state, generations = launched(), max(1, -(-evaluations // population))
    head = {
        "space": [space.process, space.plain.transition, space.nfe, space.seq_len, list(space.knobs)],
        "population": population,
        "sigma": sigma,
        "seed": seed,
        "score": label,
    }
    values: list[list[float]] = []
    if journal is not None and journal.is_file():
        saved = json.loads(journal.read_text(encoding="utf-8"))
        if saved["head"] != head:
            raise ValueError(f"{journal} belongs to another search ({saved['head']}); remove it or name another folder")
        values = saved["values"][:generations]
    search = SepCMA(mean=space.start().numpy(), sigma=sigma, seed=seed, population_size=population)
    for generation in range(generations):
        candidates = [search.ask() for _ in range(population)]
        if generation >= len(values):
            mine = range(state.process_index, population, state.num_processes)
            noise = seed * 1_000_003 + generation
            found = [(i, score(draw(torch.from_numpy(candidates[i]), noise))) for i in mine]
            found = gather_object(found) if state.num_processes > 1 else found
            values.append([value for _, value in sorted(found)])
            if journal is not None and state.is_main_process:
                journal.parent.mkdir(parents=True, exist_ok=True)
                partial = journal.with_suffix(".part")
                partial.write_text(json.dumps({"head": head, "values": values}), encoding="utf-8")
                partial.replace(journal)
        row = [value if np.isfinite(value) else 1e9 for value in values[generation]]
        search.tell(list(zip(candidates, row, strict=True)))
        if progress:
            progress(generation + 1, generations, min(row))
    return torch.from_numpy(search.mean.copy())

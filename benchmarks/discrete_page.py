"""Write the measured tables of docs/discrete.md from the cells of `benchmarks/discrete.py`.

    python benchmarks/discrete_page.py --work DIR

Only cells that were computed appear. Numbers are means over the seeds that were run, with the standard deviation between seeds
of the first two where there are several; a column holds the seeds of its main fit. A dagger marks fits refused by their own
guards: the cell is then the plain sampler, but for the score objectives, which always return what they found.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

from discrete_checks import checks

PAGE = Path(__file__).parent.parent / "docs" / "discrete.md"
RESULTS = Path(__file__).parent / "results" / "discrete.json"
MARKS = ("<!-- measured: begin -->", "<!-- measured: end -->")
TITLES = {
    "exact": "Enumerable laws (exact, no sampling noise)",
    "chains": "Markov chains, 6 symbols, 32 sites (4,000 samples a seed; KL of 4-grams, which the objective never saw)",
    "sudoku": "4x4 sudoku, trained network (10,000 samples a seed)",
    "digits": "Binary digits, shipped networks, against the held-out digits (5,000 samples a seed)",
    "text": "Characters, trained network, judged by an independent 5-gram model (100 windows of 64 a seed)",
    "cost": "Cost (share of processor time over the base sampler, median of 40 pairs of runs; bytes of the table)",
}
KEPT = {
    "exact": ["kl", "tv", "nll_gap", "entropy_gap"],
    "chains": ["4gram_kl", "lag4_tv", "nll_gap", "entropy_gap"],
    "sudoku": ["valid", "tv", "kl_among_valid", "grids"],
    "digits": ["patch_tv", "mmd_1e3", "entropy_gap"],
    "text": ["perplexity", "reverse_perplexity", "entropy_gap", "distinct_4grams"],
    "cost": ["overhead", "bytes"],
}


def tables(cells: list[dict]) -> str:
    groups: dict[tuple[str, str, str], dict[str, dict[int, list[dict]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for cell in cells:
        part, task, process, _, nfe, sampler = cell["key"].split("/", 5)
        groups[part, task, process][sampler][int(nfe)].append(cell)
    lines: list[str] = []
    for part, title in TITLES.items():
        chosen = {key[1:]: in_order(rows) for key, rows in sorted(groups.items()) if key[0] == part}
        if chosen:
            lines += [f"### {title}", "", f"Cells: {', '.join(KEPT[part])}.", ""]
        for (task, process), rows in chosen.items():
            columns = sorted({nfe for found in rows.values() for nfe in found if nfe})
            lines += [f"**{task}, {process} noise**", ""]
            lines += [f"| sampler | {' | '.join(f'NFE {nfe}' for nfe in columns)} |", "|" + "---|" * (len(columns) + 1)]
            for sampler, found in rows.items():
                entries = [column_text(rows, found, nfe, KEPT[part]) for nfe in columns]
                lines.append(f"| {sampler} | {' | '.join(entries)} |")
            lines.append("")
    return "\n".join(lines)


MAIN = ("learned exact_kl, law", "learned ngram_kl, data", "learned tv_support, data", "learned mmd, data")


def column_text(rows: dict, found: dict, nfe: int, names: list[str]) -> str:
    """A row's cell: over the seeds of the column's main fit, where there is one, so that rows compare the same laws."""
    cells = found[0] if 0 in found else found.get(nfe, [])
    main = next((rows[name][nfe] for name in MAIN if rows.get(name, {}).get(nfe)), None)
    seeds = {seed_of(cell) for cell in main or cells}
    kept = [cell for cell in cells if seed_of(cell) in seeds | {0}]
    few = kept and 0 not in found and len(kept) < len(seeds)
    return cell_text(kept, names) + (f" ({len(kept)} seed{'s' if len(kept) > 1 else ''})" if few else "")


def seed_of(cell: dict) -> int:
    return int(cell["key"].split("/")[3])


def in_order(rows: dict) -> dict:
    """Data first, then plain samplers, schedules, learned ones."""
    return dict(sorted(rows.items(), key=lambda item: (0 not in item[1], "learned" in item[0], "," in item[0])))


def cell_text(found: list[dict], names: list[str]) -> str:
    """Means over seeds, short; what is zero up to rounding is 0."""
    parts = []
    for place, name in enumerate(names):
        values = [cell[name] for cell in found if name in cell]
        if values:
            text = number(mean(values))
            parts.append(text + (f" ± {stdev(values):.1g}" if len(values) > 1 and place < 2 else ""))
    refused = sum(cell.get("refused", False) for cell in found)
    mark = "" if not refused else "†" if refused == len(found) else f"†({refused} of {len(found)})"
    return ", ".join(parts) + mark


def number(value: float) -> str:
    return "0" if abs(value) < 1e-12 else f"{value:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    work = parser.parse_args().work
    cells = [json.loads(line) for line in (work / "cells.jsonl").read_text().splitlines()]
    page = PAGE.read_text(encoding="utf-8")
    head, rest = page.split(MARKS[0])
    tail = rest.split(MARKS[1])[1]
    PAGE.write_text(f"{head}{MARKS[0]}\n\n{checks(cells)}\n{tables(cells)}\n{MARKS[1]}{tail}", encoding="utf-8")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("[\n" + ",\n".join(map(json.dumps, cells)) + "\n]\n", encoding="utf-8")
    print(f"{len(cells)} cells -> {PAGE.name}, {RESULTS.name}")


if __name__ == "__main__":
    main()

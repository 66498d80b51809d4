"""Write the measured tables of docs/discrete.md from the cells of `benchmarks/discrete.py`.

    python benchmarks/discrete_page.py --work DIR

Only cells that were computed appear. Numbers are means over the seeds that were run.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean

PAGE = Path(__file__).parent.parent / "docs" / "discrete.md"
RESULTS = Path(__file__).parent / "results" / "discrete.json"
MARKS = ("<!-- measured: begin -->", "<!-- measured: end -->")
TITLES = {
    "exact": "Enumerable laws (exact, no sampling noise)",
    "chains": "Markov chains, 6 symbols, 32 sites (4,000 samples; KL of 4-grams never seen by the objective)",
    "sudoku": "4x4 sudoku, trained network (10,000 samples)",
    "digits": "Binary digits, shipped networks, against the held-out digits (2,000 samples)",
    "text": "Characters, trained network, judged by an independent n-gram model (400 samples)",
    "cost": "Cost",
}
KEPT = {
    "exact": ["kl", "tv", "nll_gap", "entropy_gap"],
    "chains": ["4gram_kl", "lag4_tv", "nll_gap", "entropy_gap"],
    "sudoku": ["valid", "tv", "kl_among_valid", "grids"],
    "digits": ["patch_tv", "mmd_1e3", "entropy_gap"],
    "text": ["perplexity", "distinct_4grams", "entropy_gap", "lag4_tv"],
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
        chosen = {key[1:]: rows for key, rows in groups.items() if key[0] == part}
        if chosen:
            lines += [f"### {title}", "", f"Cells: {', '.join(KEPT[part])}.", ""]
        for (task, process), rows in chosen.items():
            columns = sorted({nfe for found in rows.values() for nfe in found if nfe})
            lines += [f"**{task}, {process} noise**", ""]
            lines += [f"| sampler | {' | '.join(f'NFE {nfe}' for nfe in columns)} |", "|" + "---|" * (len(columns) + 1)]
            for sampler, found in rows.items():
                entries = [cell_text(found[0] if 0 in found else found.get(nfe, []), KEPT[part]) for nfe in columns]
                lines.append(f"| {sampler} | {' | '.join(entries)} |")
            lines.append("")
    return "\n".join(lines)


def cell_text(found: list[dict], names: list[str]) -> str:
    """Means over seeds, short."""
    return ", ".join(f"{mean(cell[name] for cell in found):.3g}" for name in names) if found else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    work = parser.parse_args().work
    cells = [json.loads(line) for line in (work / "cells.jsonl").read_text().splitlines()]
    page = PAGE.read_text(encoding="utf-8")
    head, rest = page.split(MARKS[0])
    tail = rest.split(MARKS[1])[1]
    PAGE.write_text(f"{head}{MARKS[0]}\n\n{tables(cells)}\n{MARKS[1]}{tail}", encoding="utf-8")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(cells, indent=0) + "\n", encoding="utf-8")
    print(f"{len(cells)} cells -> {PAGE.name}, {RESULTS.name}")


if __name__ == "__main__":
    main()

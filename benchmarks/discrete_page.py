"""Write the measured tables of docs/discrete.md from the cells of `benchmarks/discrete.py`.

    python benchmarks/discrete_page.py --work DIR

Only cells that were computed appear. Numbers are means over seeds; "n" is how many.
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
    groups: dict[tuple[str, str, str], dict[tuple[int, str], list[dict]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        part, task, process, _, nfe, sampler = cell["key"].split("/", 5)
        groups[part, task, process][int(nfe), sampler].append(cell)
    lines: list[str] = []
    for part, title in TITLES.items():
        chosen = {key: rows for key, rows in groups.items() if key[0] == part}
        if not chosen:
            continue
        names = KEPT[part]
        lines += [f"### {title}", ""]
        for (_, task, process), rows in chosen.items():
            lines += [f"**{task}, {process}**", "", f"| NFE | sampler | {' | '.join(names)} | n |"]
            lines.append("|" + "---|" * (len(names) + 3))
            for (nfe, sampler), found in sorted(rows.items()):
                numbers = " | ".join(f"{mean(cell[name] for cell in found if name in cell):.3g}" for name in names)
                lines.append(f"| {nfe or ''} | {sampler} | {numbers} | {len(found)} |")
            lines.append("")
    return "\n".join(lines)


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

"""Writes docs/search.md from benchmarks/results/search.json and the shipped schedules."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).parent.parent

INTRODUCTION = """# Search

`fewstep search` looks for the solver schedule of *your* model at a given number of network evaluations (NFE): times, and per
step the Taylor order, what is expanded, in which variable, from which nodes, relaxation, corrector, and an analytic first step.

    fewstep search run --model digits-conditional --guidance 2 --nfe 5 --trials 200 --out found.json --report report.html
    fewstep search run ... --dry-run                      # what it would cost, here and for an SD-size model
    fewstep search status --storage sqlite:///found.db
    fewstep search best   --storage sqlite:///found.db
    fewstep sample --sampler found.json --nfe 5 --out samples

What a run does:

1. solves the model with many evaluations from three disjoint sets of noises (train, validation, test);
2. evaluates classic solvers on classic grids (at most 40% of the trials), then what the strategy proposes; the value is the
   RMSE to the converged solution from the same train noises;
3. re-ranks the ten best on the validation noises;
4. refines the winner by gradients through the sampler, times first and then all coefficients, stopped on the validation noises;
5. scores it, the search's own best and the best classic solvers on the test noises, which no choice depends on.

`s3` (the default) fits a small ranking network on all trials and evolves schedules against it; `evolution` is the loop
published with the USF code; `random`, `tpe`, `gp` and `cmaes` (times and relaxations only) are there to compare. All are
Optuna samplers.

## Many workers

Any number of processes run the same command with the same `--storage`, one a GPU, on as many machines as there are; a study has
its budget in COMPLETE trials. Use SQLite for one machine and PostgreSQL (`pip install "fewstep[postgres]"`) for several. A
worker that dies is noticed by Optuna's heartbeat, its trial is failed and its schedule retried by another worker.
Evaluations are also kept by content (objective and schedule), so nothing is computed twice.

    accelerate launch --num_processes 8 --no_python fewstep search run ... --storage postgresql://user@host/db
    sbatch --array=0-15 --wrap 'fewstep search run ... --storage postgresql://user@host/db'

"""


LIMITS = """## Limits

- The RMSE over few noises is dominated by the few samples that change their mode; 64 noises rank schedules, but the searched
  value of the winner is too good by a third or more: believe the held-out columns.
- On guided `digits-conditional` the refinement found nothing better than the search on 40 noises: the error is steep in the
  coefficients there, and steps that lower it on the train noises raise it on others. More noises are the remedy, and cost.
- Guidance scale and interval are not searched, nor is noise in steps: a schedule file has no place for the former, and the
  endpoint error of a stochastic schedule says nothing.
"""


def _spread(values: list[float], digits: int = 3) -> str:
    text = f"{mean(values):.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {stdev(values):.{digits}f}"


def write(results: Mapping[str, Any], path: Path) -> None:
    parts = [INTRODUCTION]
    for name, title in (
        ("mixture", "Exact mixture (64 dimensions, 20 components)"),
        ("digits", 'Reference pipeline "digits"'),
        ("cifar", "16-pixel CIFAR model"),
    ):
        if name in results:
            parts.append(_found(title, name, results[name]))
    if "strategies" in results:
        parts.append(_strategies(results["strategies"]))
    parts += [_shipped(), LIMITS]
    path.write_text("\n".join(parts), encoding="utf-8")


def _found(title: str, name: str, cells: Mapping[str, Any]) -> str:
    rows, gaps = [], []
    for nfe in sorted({int(key.split("-")[0][3:]) for key in cells}):
        own = [record for key, record in sorted(cells.items()) if key.startswith(f"nfe{nfe}-")]
        best = [min(score["value"] for score in record["baselines"].values()) for record in own]
        plain = [record["baselines"]["plain"]["value"] for record in own]
        found, alone = ([record[key] for record in own] for key in ("found", "search_alone"))
        distance = "-"
        if all("frechet" in record for record in own):
            kinds = [min(record["baselines"], key=lambda k, r=record: r["baselines"][k]["value"]) for record in own]
            above = [
                (r["frechet"]["found"] - r["frechet"]["converged"]) / (r["frechet"][kind] - r["frechet"]["converged"])
                for r, kind in zip(own, kinds, strict=True)
            ]
            distance = _spread(above, 2)
        ratio = _spread([f / b for f, b in zip(found, best, strict=True)], 2)
        cells_text = (nfe, len(own), _spread(plain, 4), _spread(best, 4), _spread(alone, 4), _spread(found, 4), ratio, distance)
        rows.append("| " + " | ".join(map(str, cells_text)) + " |")
        for split in ("train", "validation", "test"):
            gaps.append((nfe, split, _spread([record["gap"][split] for record in own], 4)))
    seconds = _spread([record["cpu_seconds"] for record in cells.values()], 0)
    head = (
        "| NFE | seeds | best classic | with analytic first step | search alone | found | ratio | distance ratio |\n"
        + "|---" * 8
        + "|"
    )
    lines = [
        f"## {title}\n",
        f"`python benchmarks/search.py {name}`. RMSE to the converged solution on held-out noises, mean ± standard",
        "deviation over the search's seeds. *Best classic*: of the classic solvers and grids that were tried (the first 240 of",
        "`search.baselines` unless said otherwise), chosen on the train noises; the next column: those with an analytic first",
        "step. *Search alone* is before refinement. *Ratio*: found over the better of the classic ones. *Distance ratio*:",
        "squared Frechet distance of the plain states to the data, above the converged solution's, over the same of that",
        f"classic one. One cell takes {seconds} CPU seconds.\n",
        head,
        *rows,
        "\nError of the found schedules on the noises they were searched on, selected on, and neither:\n",
        "| NFE | set | RMSE |\n|---|---|---|",
        *(f"| {nfe} | {split} | {value} |" for nfe, split, value in gaps),
    ]
    return "\n".join(lines) + "\n"


def _strategies(cells: Mapping[str, Any]) -> str:
    budgets = sorted({int(k) for record in cells.values() for k in record["best"]})
    lines = [
        "## Strategies at equal budgets\n",
        "`python benchmarks/search.py strategies`: the mixture at NFE 5, 64 noises; best value so far on the noises that are",
        "searched on, mean ± standard deviation over seeds; last column: the final winner on 512 other noises. TPE is given",
        "the same baselines first, CMA-ES starts from the best-known one.\n",
        "| strategy | seeds | " + " | ".join(f"{k} trials" for k in budgets) + " | held out |",
        "|---" * (len(budgets) + 3) + "|",
    ]
    for strategy in ("s3", "evolution", "tpe", "cmaes", "random"):
        own = [record for key, record in sorted(cells.items()) if key.startswith(f"{strategy}-")]
        if own:
            values = [_spread([record["best"][str(k)] for record in own], 4) for k in budgets]
            lines.append(f"| {strategy} | {len(own)} | {' | '.join(values)} | {_spread([r['test'] for r in own], 4)} |")
    return "\n".join(lines) + "\n"


def _shipped() -> str:
    lines = [
        "## Schedules that ship\n",
        "`python benchmarks/search_demo.py` found them; held-out RMSE with 95% bootstrap intervals, 60 noises.\n",
        "| name | NFE | found | best classic | with analytic first step |\n|---|---|---|---|---|",
    ]
    files = sorted((ROOT / "configs" / "schedules").glob("*.json"), key=lambda p: json.loads(p.read_text())["nfe"])
    for path in files:
        data = json.loads(path.read_text())
        scores = data["provenance"].get("scores")
        if not scores:
            continue
        cells = [scores["found"], *(scores["baselines"].get(kind) for kind in ("plain", "analytic"))]
        texts = [f"{c['value']:.4f} ({c['interval'][0]:.4f} .. {c['interval'][1]:.4f})" if c else "-" for c in cells]
        lines.append(f"| {path.stem} | {data['nfe']} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"

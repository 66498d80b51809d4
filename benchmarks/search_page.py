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
    fewstep search run ... --guidance 5,7.5,10            # one schedule for several guidance scales and all the prompts given
    fewstep search run ... --dry-run                      # what it would cost, here and for an SD-size model
    fewstep search status --storage sqlite:///found.db
    fewstep search best   --storage sqlite:///found.db
    fewstep sample --sampler found.json --nfe 5 --out samples

What a run does:

1. solves the model with many evaluations from three disjoint sets of noises (train, validation, test);
2. screens every classic solver on every classic grid, with and without an analytic first step, by halving: all on 8 train
   noises, the best 96 on 24, the best 24 on all;
3. searches from the best 16 of them (at most 40% of the trials are such starts); a trial's value is the RMSE to the converged
   solution from the train noises;
4. re-ranks the ten best on the validation noises;
5. refines times and coefficients by damped least squares (Levenberg-Marquardt), from the search's winner and from the best
   classic ones, then the best of these for longer, stopped on the validation noises. Every number is moved a little to see
   what that does to the samples, so the network is only evaluated forwards, and a run needs no memory for gradients;
6. scores it, the search's own best and the best classic solvers on the test noises, which no choice depends on.

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


OPTIONS = {
    "mixture": "",
    "digits": " --reference 240 --noises 256 --test 512 --many 512 --trials 30 --refine 3",
    "cifar": " --data FILE --noises 48 --test 96 --many 512 --trials 30 --refine 3",
}

LIMITS = """## Limits

- The RMSE belongs to the few samples that change their mode; refinement therefore averages errors to the power 1.5.
- Guidance scale and interval are not searched: a schedule file has no place for them. Noise in steps is searched with
  `SearchSpace(noise=True)` and `Objective.distance`, for the endpoint error says nothing about stochastic schedules.
- A schedule fits the model, guidance scale and classes or prompts that it was searched on; search again for others.
"""


FINDINGS = """## Findings

Ratios are errors of found schedules over those of the best of 506 classic solvers x grids, three seeds each.

- **Exact mixture**: 0.46, 0.40, 0.45 and 0.48 at 4, 5, 6 and 8 evaluations and 0.15 at 10 (single runs 0.09 to 0.71). Six
  evaluations are as near to the solution as the best classic solver is with ten. The distance to the data falls 39-, 21-, 10-,
  4- and 12-fold.
- **16-pixel CIFAR network**: 0.50, 0.39, 0.33, 0.33 and 0.33 (0.29 to 0.62), with the same error on noises that were searched
  on and on others, though there are only 48. Six evaluations are nearer to the solution than the best classic solver is with
  ten. Classic solvers are *below* the converged solution's distance to the data, for what a solver gets wrong can look more
  like data than what a small network means; the found ones at 10 evaluations are at it.
- **Digits without guidance**: 0.74, 0.67, 0.59, 0.66 and 0.63 (0.39 to 0.88), so not below 0.6 at 5 evaluations. What limits
  it: a few noises lie so near to a boundary between two digits that any error decides which digit they become. Without the
  worst noise in fifty, for found and classic alike, it is 0.56 at 5; the median's is 0.55. Such noises also make the train
  error the lower one (0.012 against 0.024 at 10): a schedule can be fitted to the side on which each of 256 noises falls, which
  says nothing about others. The reference takes 240 evaluations there, for fewer move such noises too; `fewstep search run`
  says when its converged solutions are uncertain.
- With guidance 2 the schedules that ship have 0.66, 0.62, 0.58 and 0.61 of the best classic error at 5, 6, 8 and 10
  evaluations. At 5 they are nearer to the model's own solution than any scheduler of diffusers is at 10, in the demo's hundred
  noises and in another (`fewstep demo --seed 2000`): the same picture in half the calls.
- Most of the gain is the refinement's. The search decides where it begins, and the starts end at different errors. Gradient
  descent through the sampler, which it was before, ended at 0.53 instead of 0.15 on the mixture at 10 evaluations and at 0.53
  instead of 0.33 on CIFAR, with memory for the whole trajectory; on the digits, where boundaries decide, little changed at 5. A
  round's price grows with the third power of the evaluations.
- Five minutes are enough for a useful schedule: the command below takes 2 minutes 6 seconds on two idle cores and finds 0.0676
  (95% interval 0.0507 to 0.0836) where the best classic solver has 0.1019 (0.0834 to 0.1202), on 256 noises that no choice saw.

      fewstep search run --model digits --nfe 5 --trials 40 --noises 128 --out found.json

- S3's predictor is told, besides a schedule's genes, its errors on one-dimensional problems with known answers. It is ahead of
  all other strategies at every budget on average over five seeds on the noises searched on; on others evolution is level with
  it at 200 trials. Budgets are separate runs of S3, so a larger one can end worse in a single seed.
- Where 64 noises of the mixture are searched on (strategies below) the winner's error on others is up to half as large again.

"""


COLUMNS = """## How to read the tables

All errors are RMSE to the converged solution on noises that nothing else depends on, mean ± standard deviation over the
search's seeds. *Best classic*: every solver of `search.baselines` that diffusers has, on every grid, without ("plain") or
with an analytic first step, chosen on the train noises. *Search alone*: before refinement. *Ratio*: found over the better
classic one; *without worst*: when each leaves out its worst noise in fifty; *median*: of the median sample. *Distance*: squared
Frechet distance to the data (states of the mixture, pixels of the digits, 4x4 averages for CIFAR), found / the better of the
classic two, all less the converged solution's from the same noises.

"""


def _spread(values: list[float], digits: int = 3) -> str:
    text = f"{mean(values):.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {stdev(values):.{digits}f}"


def write(results: Mapping[str, Any], path: Path) -> None:
    parts = [INTRODUCTION, FINDINGS, COLUMNS]
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
        kinds = [min(r["baselines"], key=lambda k, r=r: r["baselines"][k]["value"]) for r in own]
        best = [r["baselines"][kind]["value"] for r, kind in zip(own, kinds, strict=True)]
        plain = [r["baselines"]["plain"]["value"] for r in own]
        found, alone = ([r[key] for r in own] for key in ("found", "search_alone"))
        above = {k: [r["frechet"][k] - r["frechet"]["converged"] for r in own] for k in ("found", *own[0]["baselines"])}
        classic = [min(above[k][i] for k in own[0]["baselines"]) for i in range(len(own))]
        texts = (
            nfe, len(own), _spread(plain, 4), _spread(best, 4), _spread(alone, 4), _spread(found, 4),
            f"**{_spread([f / b for f, b in zip(found, best, strict=True)], 2)}**",
            *(
                _spread([r[name]["found"] / r[name][kind] for r, kind in zip(own, kinds, strict=True)], 2)
                for name in ("without_worst", "median")
            ),
            f"{_spread(above['found'], 4)} / {_spread(classic, 4)}",
        )  # fmt: skip
        rows.append("| " + " | ".join(map(str, texts)) + " |")
        gap = [_spread([r["gap"][split] for r in own], 4) for split in ("train", "validation", "test")]
        gaps.append(f"| {nfe} | {' | '.join(gap)} |")
    settings = next(iter(cells.values()))["settings"]
    head = (
        "NFE",
        "seeds",
        "best plain classic",
        "best classic",
        "search alone",
        "found",
        "ratio",
        "without worst",
        "median",
        "distance",
    )
    return "\n".join([
        f"## {title}\n",
        f"`python benchmarks/search.py {name}{OPTIONS[name]}`: {settings['noises']} train noises, {settings['trials']} trials, "
        f"{settings['refine']} rounds; one cell takes {_spread([r['cpu_seconds'] for r in cells.values()], 0)} "
        "seconds of one core.\n",
        "| " + " | ".join(head) + " |", "|---" * len(head) + "|", *rows,
        "\nError of the found schedules on the noises that they were searched on, selected on, and neither:\n",
        "| NFE | train | validation | test |\n|---|---|---|---|", *gaps, "",
    ])  # fmt: skip


def _strategies(cells: Mapping[str, Any]) -> str:
    budgets = sorted({int(k) for record in cells.values() for k in record["best"]})
    lines = [
        "## Strategies at equal budgets\n",
        "`python benchmarks/search.py strategies`: the mixture at NFE 5, 64 noises, search alone without refinement. S3,",
        "evolution and TPE are given the same 20 baselines first, CMA-ES starts from the best-known one. Best value on the",
        "noises that are searched on / the same schedules on 512 other noises; mean ± standard deviation over seeds.\n",
        "| strategy | seeds | " + " | ".join(f"{k} trials" for k in budgets) + " |",
        "|---" * (len(budgets) + 2) + "|",
    ]
    for strategy in ("s3", "evolution", "tpe", "cmaes", "random"):
        own = [record for key, record in sorted(cells.items()) if key.startswith(f"{strategy}-")]
        if own:
            values = [" / ".join(_spread([r[part][str(k)] for r in own], 4) for part in ("best", "test")) for k in budgets]
            lines.append(f"| {strategy} | {len(own)} | {' | '.join(values)} |")
    taus = [record["tau"][-1] for key, record in cells.items() if key.startswith("s3-") and record["tau"]]
    if taus:
        lines.append(
            f"\nKendall's tau of S3's predictor on held-out trials, last stage of the longest run: {_spread(taus, 2)}."
        )
    return "\n".join(lines) + "\n"


def _shipped() -> str:
    lines = [
        "## Schedules that ship\n",
        "`python benchmarks/search_demo.py` found them; held-out RMSE with 95% bootstrap intervals, 200 noises.\n",
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

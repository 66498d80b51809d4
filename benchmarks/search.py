"""Searched schedules against the best classic ones, and S3 against other strategies, on held-out noises.

    python benchmarks/search.py mixture      found schedules against every diffusers solver x grid, exact 64-d mixture
    python benchmarks/search.py digits       the same on the reference pipeline "digits"
    python benchmarks/search.py cifar        the same on benchmarks/models/cifar16
    python benchmarks/search.py strategies   S3, evolution, TPE, CMA-ES and random at equal budgets, mixture
    python benchmarks/search.py page         rebuild docs/search.md from benchmarks/results/search.json

Results are kept cell by cell: an interrupted run goes on where it stopped. One thread.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.append(sys.path.pop(0))  # this file has the name of the package that it measures

import numpy as np
import torch
from sklearn.mixture import GaussianMixture as Fit
from torch.nn.functional import avg_pool2d

from samplers import NoiseSchedule, SolverSchedule
from samplers.denoisers import GaussianMixture
from samplers.evaluation import FrechetReference
from samplers.reference import digit_images, load, load_folder
from search import Objective, SearchSpace, run_search
from search.converged import teacher
from search.find import find_schedule
from search.pipeline_problem import pipeline_problem
from search.study import TrialRecord

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "search.json"
SEEDS = (0, 1, 2)
BUDGETS = (50, 100, 200, 400)
WORST = 50  # one noise in so many is left out of "without_worst"


def results() -> dict:
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}


def keep(part: str, cell: str, record: dict) -> None:
    all_results = results()
    all_results.setdefault(part, {})[cell] = record
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    partial = RESULTS.with_suffix(".part")
    partial.write_text(json.dumps(all_results, indent=1, sort_keys=True) + "\n")
    partial.replace(RESULTS)


def mixture() -> tuple[GaussianMixture, NoiseSchedule]:
    """Twenty full-covariance components fitted to scikit-learn's digits: a 64-d law with an exact denoiser."""
    data = digit_images("train")[0].flatten(1).double().numpy()
    fit = Fit(20, covariance_type="full", reg_covar=1e-2, random_state=0).fit(data)
    weights, means, covariances = (torch.from_numpy(v) for v in (fit.weights_, fit.means_, fit.covariances_))
    return GaussianMixture(means, weights=weights, covariances=covariances), NoiseSchedule.vp_linear()


def noises(count: int, seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def cell(name: str, nfe: int, seed: int, options: argparse.Namespace) -> None:
    """One model, NFE and seed: search, refine, and compare on held-out noises."""
    options.work.mkdir(parents=True, exist_ok=True)
    sets = {"train": (options.noises, 10 * seed + 1), "validation": (options.noises, 10 * seed + 2), "test": (options.test, 9)}
    if name == "mixture":
        law, noise = mixture()
        made = {
            split: Objective.endpoint(law.denoiser(noise), noise, noises(count, 1000 * count + s, 64), 100)
            for split, (count, s) in sets.items()
        }
        reference = FrechetReference(law.mean, law.covariance)
    else:
        pipe, call = (load("digits"), {}) if name == "digits" else (load_folder(ROOT / "benchmarks/models/cifar16"), {})
        if name == "cifar":
            call = {"class_labels": list(range(10)), "guidance_scale": 1.0}
        problem = pipeline_problem(pipe, call)
        noise = problem.noise_schedule
        made = {s: problem.endpoint(s, count, 100 * k, options.reference, options.work) for s, (count, k) in sets.items()}
        images = digit_images("train")[0] if name == "digits" else cifar_images(options.data)
        reference = FrechetReference.from_features(features(images))
    start = time.process_time()
    found = find_schedule(
        SearchSpace(noise, nfe), *(made[split] for split in sets), name=f"{name}-nfe{nfe}", trials=options.trials, seed=seed,
        refine_rounds=options.refine, baseline_limit=options.baselines,
    )  # fmt: skip
    record = {
        "found": found.test.value,
        "search_alone": found.searched.value,
        "gap": found.gap,
        "baselines": {kind: {"name": score.name, "value": score.value} for kind, score in found.baselines.items()},
        "reference_error": made["test"].reference_error,
        "cpu_seconds": time.process_time() - start,
        "settings": {key: getattr(options, key) for key in ("reference", "noises", "trials", "refine")},
    }
    rows = {"found": found.schedule, **{k: s.schedule for k, s in found.baselines.items()}}
    errors = {kind: squared_errors(made["test"], schedule) for kind, schedule in rows.items()}
    record["median"] = {kind: values.median().sqrt().item() for kind, values in errors.items()}
    record["without_worst"] = {
        kind: values[: -max(len(values) // WORST, 1)].mean().sqrt().item() for kind, values in errors.items()
    }
    many = noises(options.many, 4242, *made["test"].x_T.shape[1:])
    again = teacher(made["test"].denoiser, noise, many, nfe=options.reference, cache=options.work, model=name, batch_size=1024)
    converged = again.solution
    judge = replace(made["test"], x_T=many, reference=converged, batch_size=1024)
    samples = {kind: features(judge.samples(schedule)) for kind, schedule in rows.items()}
    samples["converged"] = features(converged)
    record["frechet"] = {kind: reference.distance_to_features(x) for kind, x in samples.items()}
    found.schedule.save(options.work / f"{name}-nfe{nfe}-seed{seed}.json")
    keep(name, f"nfe{nfe}-seed{seed}", record)
    best = min(score.value for score in found.baselines.values())
    print(f"{name} nfe {nfe} seed {seed}: {found.test.value:.4f} / {best:.4f} = {found.test.value / best:.2f}", flush=True)


def features(x: torch.Tensor) -> torch.Tensor:
    """What the distribution distance compares: states or pixels as they are, 16-pixel colour images averaged over 4x4."""
    return (avg_pool2d(x, 4) if x.shape[1:] == (3, 16, 16) else x).flatten(1).double()


def cifar_images(path: Path | None) -> torch.Tensor:
    if path is None:
        raise SystemExit("the cifar part needs --data: an npz file with CIFAR-10 averaged to 16x16, uint8 NHWC, key train")
    return torch.from_numpy(np.load(path)["train"]).permute(0, 3, 1, 2).float() / 127.5 - 1


def squared_errors(objective: Objective, schedule: SolverSchedule) -> torch.Tensor:
    """(B,) every noise's mean squared error, in order."""
    assert objective.reference is not None
    return (objective.samples(schedule) - objective.reference).double().square().flatten(1).mean(1).sort().values


def strategies(options: argparse.Namespace) -> None:
    """Best value so far at every budget; each strategy has the same 20 baselines first, but random and CMA-ES."""
    law, noise = mixture()
    for seed in map(int, options.seeds.split(",")):
        train = Objective.endpoint(law.denoiser(noise), noise, noises(64, 500 + seed, 64), 100)
        test = Objective.endpoint(law.denoiser(noise), noise, noises(512, 900, 64), 100)
        for strategy in ("s3", "evolution", "tpe", "cmaes", "random"):
            name = f"{strategy}-seed{seed}"
            if name in results().get("strategies", {}):
                continue
            start = time.process_time()
            # S3 spends a budget differently when it is larger, so it is run for each; the others' first trials are the same.
            runs = {
                budget: run_search(SearchSpace(noise, 5), train, strategy, budget, seed=seed, seeds=20)
                for budget in (BUDGETS if strategy == "s3" else BUDGETS[-1:])
            }
            curve = np.minimum.accumulate([record.value for record in runs[BUDGETS[-1]].trials])
            longest = runs[BUDGETS[-1]]
            record = {
                "best": {str(k): runs[k].value if k in runs else float(curve[k - 1]) for k in BUDGETS},
                "test": {str(k): test(runs[k].best if k in runs else best_of(longest.trials[:k])) for k in BUDGETS},
                "curve": [round(float(v), 6) for v in curve],
                "tau": [stage["tau"] for stage in longest.stages],
                "cpu_seconds": time.process_time() - start,
            }
            keep("strategies", name, record)
            print(name, record["best"], record["test"], flush=True)


def best_of(trials: Sequence[TrialRecord]) -> SolverSchedule:
    """The schedule with the lowest value."""
    return min(trials, key=lambda trial: trial.value).schedule


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("mixture", "digits", "cifar", "strategies", "page"))
    parser.add_argument("--nfe", default="5,10,8,4,6")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--noises", type=int, default=512)
    parser.add_argument("--test", type=int, default=1024)
    parser.add_argument("--many", type=int, default=8192, help="noises of the distribution distance")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "search", help="converged solutions and found schedules")
    parser.add_argument("--data", type=Path, help="16-pixel CIFAR-10 for its distribution distance")
    parser.add_argument("--reference", type=int, default=60, help="evaluations of a network's converged solutions")
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--refine", type=int, default=6)
    parser.add_argument("--baselines", type=int, help="only the first of the list")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.part == "page":
        from search_page import write

        write(results(), ROOT / "docs" / "search.md")
    elif options.part == "strategies":
        strategies(options)
    else:
        for nfe in map(int, options.nfe.split(",")):
            for seed in map(int, options.seeds.split(",")):
                if f"nfe{nfe}-seed{seed}" not in results().get(options.part, {}):
                    cell(options.part, nfe, seed, options)


if __name__ == "__main__":
    main()

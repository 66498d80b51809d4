"""Find the 10-evaluation solver schedules of the minority benchmark, for the unguided models.

    python benchmarks/minority_schedules.py --model mixture --model digits-planted [--model cifar16-thinned] --cache DIR

writes ``benchmarks/results/minority-MODEL-nfe10.json`` with provenance. A schedule that exists is left as it is. The objective
is the endpoint error of the unguided probability-flow ODE; guidance and its classifier take no part, so one schedule serves all
rows of the benchmark.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.append(sys.path.pop(0))  # search.py beside this file has the name of the package

import torch
from minority_mixture import DIM, Mixture

from samplers.reference import load_folder
from search import Objective, SearchSpace
from search.find import find_schedule
from search.pipeline_problem import pipeline_problem

HERE = Path(__file__).parent
RESULTS, MODELS = HERE / "results", HERE / "models"
NFE = 10


def schedule_path(model: str) -> Path:
    """Where the schedule of a model is kept."""
    return RESULTS / f"minority-{model}-nfe{NFE}.json"


def objectives(model: str, noises: int, cache: Path | None) -> tuple[Objective, Objective, Objective, str]:
    """Endpoint errors on three disjoint sets of noises, and what the model is."""
    splits = ("train", "validation", "test")
    if model == "mixture":  # of seed 0; the benchmark's other seeds are other mixtures
        problem = Mixture(0)
        noise = [torch.randn(2 * noises, DIM, generator=torch.Generator().manual_seed(20_000 + i)) for i in range(3)]
        made = [Objective.endpoint(problem.denoiser, problem.noise, x.double(), 200) for x in noise]
        return *made, "the mixture of seed 0"
    problem = pipeline_problem(load_folder(MODELS / model), {})
    made = [problem.endpoint(split, noises, seed=20_000, reference_nfe=60, cache=cache) for split in splits]
    return *made, problem.model


def find(model: str, trials: int, refine: int, noises: int, cache: Path | None) -> None:
    """Search, report, save."""
    start = time.process_time()
    train, validation, test, weights = objectives(model, noises, cache)
    print(f"{model}: reference error {test.reference_error:.4f}, {time.process_time() - start:.0f} CPU s", flush=True)
    found = find_schedule(
        SearchSpace(train.noise_schedule, NFE), train, validation, test, name=schedule_path(model).stem, trials=trials,
        refine_rounds=refine, baseline_limit=24, facts={"model": model, "weights": weights},
        say=lambda text: print(f"  {text} {time.process_time() - start:.0f} CPU s", flush=True),
    )  # fmt: skip
    found.schedule.save(schedule_path(model))
    classics = {kind: (score.name, round(score.value, 4)) for kind, score in found.baselines.items()}
    print(f"{model}: {found.test.value:.4f} (search alone {found.searched.value:.4f}), classics {classics}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=("mixture", "digits-planted", "cifar16-thinned"), required=True)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--refine", type=int, default=6)
    parser.add_argument("--noises", type=int, default=40)
    parser.add_argument("--cache", type=Path, default=None, help="folder for the converged solutions")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for model in args.model:
        if not schedule_path(model).is_file():
            find(model, args.trials, args.refine, args.noises, args.cache)


if __name__ == "__main__":
    main()

"""Find the schedules that `fewstep demo` shows: the reference pipeline "digits-conditional", guidance 2, all ten classes.

    python benchmarks/search_demo.py [--nfe 5,8,10,6] [--trials 60] [--refine 6]

writes configs/schedules/digits-conditional-nfeN.json with provenance. A schedule that exists is left as it is.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.append(sys.path.pop(0))  # search.py beside this file has the name of the package

import torch

from samplers.reference import load
from search import SearchSpace
from search.find import find_schedule
from search.pipeline_problem import pipeline_problem

ROOT = Path(__file__).parent.parent
MODEL, GUIDANCE = "digits-conditional", 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nfe", default="5,8,10,6")
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--refine", type=int, default=6)
    parser.add_argument("--noises", type=int, default=128)
    parser.add_argument("--out", type=Path, default=ROOT / "configs" / "schedules")
    parser.add_argument("--cache", type=Path, default=None, help="folder for the converged solutions")
    options = parser.parse_args()
    torch.set_num_threads(1)
    problem = pipeline_problem(load(MODEL), {"class_labels": list(range(10)), "guidance_scale": GUIDANCE})
    train, validation, test = (
        problem.endpoint(split, count, seed=10_000, reference_nfe=60, cache=options.cache)
        for split, count in (("train", options.noises), ("validation", options.noises), ("test", 200))
    )
    print(f"reference error {test.reference_error:.4f}", flush=True)
    for nfe in map(int, options.nfe.split(",")):
        path = options.out / f"{MODEL}-nfe{nfe}.json"
        if path.exists():
            continue
        start = time.process_time()
        found = find_schedule(
            SearchSpace(problem.noise_schedule, nfe),
            train,
            validation,
            test,
            name=path.stem,
            trials=options.trials,
            refine_rounds=options.refine,
            facts={"model": MODEL, "weights": problem.model, "guidance": GUIDANCE, "class_labels": list(range(10))},
            say=lambda text: print(f"  {text} {time.process_time() - start:.0f} CPU s", flush=True),  # noqa: B023
        )
        found.schedule.save(path)
        classics = {kind: round(score.value, 4) for kind, score in found.baselines.items()}
        print(f"nfe {nfe}: {found.test.value:.4f} (search alone {found.searched.value:.4f}), baselines {classics}", flush=True)


if __name__ == "__main__":
    main()

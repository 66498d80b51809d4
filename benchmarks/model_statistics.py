"""What estimated model statistics do to the error of DPM-Solver-v3: the table of docs/statistics.md.

    python benchmarks/model_statistics.py            about two minutes on one core

An exact mixture of five Gaussians in 24 dimensions, VP-linear noise schedule, steps even in lambda from t = 1 to 1e-3.
Statistics from one set of samples; errors on starting noise they never saw, for three seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor

from samplers import NoiseSchedule, SolverSchedule, StepStrategy, sample
from samplers.denoisers import GaussianMixture
from samplers.statistics import EmpiricalStatistics

NOISE = NoiseSchedule.vp_linear()
DIMENSION, SAMPLES, HELD_OUT, CONVERGED = 24, 1024, 512, 400
NFES = (5, 8, 10, 20, 40)


def plan(pred: str, order: int, steps: int) -> SolverSchedule:
    """Multistep Taylor steps even in lambda."""
    ends = NOISE.lam(torch.tensor([1.0, 1e-3])).tolist()
    times = NOISE.t_of_lam(torch.linspace(*ends, steps + 1, dtype=torch.float64)).tolist()
    return SolverSchedule(
        times=tuple(times), steps=tuple(StepStrategy(order=min(order, i + 1), pred=pred) for i in range(steps))
    )


def errors(seed: int) -> Iterator[tuple[int, int, str, float]]:
    """(order, NFE, prediction, mean over held-out samples of the endpoint's RMSE)."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(5, DIMENSION, dtype=torch.float64, generator=generator)
    law = GaussianMixture(means, torch.rand(5, generator=generator) * 0.3 + 0.1)
    denoiser, data = law.denoiser(NOISE), law.sample(SAMPLES, generator)
    known: dict[str, EmpiricalStatistics | None] = {"x0": None, "eps": None}
    known["v3"] = EmpiricalStatistics.estimate(denoiser, NOISE, data, generator=generator, batch_size=SAMPLES)
    known["v3, pooled"] = EmpiricalStatistics.estimate(
        denoiser, NOISE, data, generator=generator, batch_size=SAMPLES, pool="all"
    )
    x = torch.randn(HELD_OUT, DIMENSION, dtype=torch.float64, generator=generator)
    exact = sample(denoiser, x, plan("x0", 3, CONVERGED), NOISE)

    def error(found: Tensor) -> float:
        return (found - exact).square().mean(1).sqrt().mean().item()

    for order in (1, 2, 3):
        for steps in NFES:
            for name, statistics in known.items():
                schedule = plan(name.partition(",")[0], order, steps)
                yield order, steps, name, error(sample(denoiser, x, schedule, NOISE, statistics=statistics))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="mixtures with their own data and noise")
    rows: dict[tuple[int, int], dict[str, list[float]]] = {}
    for seed in range(parser.parse_args().seeds):
        for order, steps, name, value in errors(seed):
            rows.setdefault((order, steps), {}).setdefault(name, []).append(value)
    print("| order | NFE | x0 | eps | v3 | v3, one number per node | x0 / v3 |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for (order, steps), columns in rows.items():
        cells = [f"{sum(values) / len(values):.4f}" for values in columns.values()]
        ratios = [a / b for a, b in zip(columns["x0"], columns["v3"], strict=True)]
        print(f"| {order} | {steps} | {' | '.join(cells)} | {min(ratios):.2f} to {max(ratios):.2f} |")


if __name__ == "__main__":
    main()

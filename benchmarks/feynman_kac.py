"""Feynman-Kac correctors measured: annealed mixtures with known answers, guided digits, and what the corrector costs.

    python benchmarks/feynman_kac.py                     everything, about half an hour of one core, into docs/feynman_kac.md
    python benchmarks/feynman_kac.py --only gmm40        one section: gmm40, lj13, steps, dimension, exact, digits, cost
    python benchmarks/feynman_kac.py --render            only write the page from the numbers at hand

Numbers are kept in benchmarks/results/feynman_kac.json, one entry per run; a run that is there is not repeated, so an
interrupted benchmark goes on where it stopped. Seeds are fixed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from feynman_kac_cost import cost
from feynman_kac_digits import digits, exact, gen
from feynman_kac_models import Grid, forty_gaussians, lennard_jones, mmd, wasserstein, wasserstein_1d
from torch import Tensor

import samplers.particles.native as native
from samplers import NoiseSchedule
from samplers.denoisers import GaussianMixture
from samplers.particles import FeynmanKac, Target

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results" / "feynman_kac.json", HERE.parent / "docs" / "feynman_kac.md"
VARIANTS = {"none": {"weight_window": (0.0, 0.0)}, "FKC": {}, "wrong sign": {}}
PROPOSALS = {"target score": lambda beta: 1.0, "tempered noise": lambda beta: beta**-0.5, "extra Langevin": lambda beta: 1.5}
Row = dict[str, float]


@contextmanager
def sign_flipped(flip: bool) -> Iterator[None]:
    """The negative control: every weight increment with the wrong sign."""
    right = native.log_interval
    if flip:
        native.log_interval = lambda now, after: -right(now, after)
    try:
        yield
    finally:
        native.log_interval = right


def annealed(
    model: GaussianMixture,
    beta: float,
    noise: float,
    variant: str,
    sigmas: tuple[float, float],
    steps: int,
    k: int,
    seed: int,
    **settings: Any,
) -> tuple[Tensor, float, int]:
    """Equally weighted particles for q^beta, log Z, and how many starting particles have descendants."""
    high, low = sigmas
    schedule = NoiseSchedule.edm(low, high)
    times = torch.logspace(math.log10(high), math.log10(low), steps + 1, dtype=torch.float64)
    fk = FeynmanKac(Target.power(beta), noise=noise, **VARIANTS[variant], **settings)
    with sign_flipped(variant == "wrong sign"):
        cloud = fk.sample(
            {"model": model.denoiser(schedule)}, schedule, times, particles=k, shape=model.means.shape[1:], generator=gen(seed),
            dtype=torch.float64,
        )  # fmt: skip
    return cloud.resampled(gen(seed)), float(cloud.log_z), int(cloud.trace.surviving()[-1])


# ---- sections: each yields (key, function that measures it) -----------------------------------------------------------------


def gmm40() -> Iterator[tuple[str, Callable[[], Row]]]:
    beta, low, k = 3.0, 0.05, 5000
    model, truths = forty_gaussians(), {}

    def truth() -> Grid:
        if not truths:
            truths["grid"] = Grid.of(model, beta, low)
        return truths["grid"]

    def measure(x: Tensor, seed: int) -> Row:
        exact = truth().sample(k, gen(1000 + seed))
        w1, w2 = wasserstein(x[:1000], exact[:1000])
        return {"w1": w1, "w2": w2, "mmd": mmd(x[:2000], exact[:2000], 10.0), "tv": truth().tv(x)}

    def corrected(seed: int, noise: float, variant: str, steps: int = 500, k: int = k, **settings: Any) -> Row:
        x, log_z, roots = annealed(model, beta, noise, variant, (200.0, low), steps, k, seed, **settings)
        return {**measure(x[torch.randperm(k, generator=gen(seed))], seed), "dlogz": log_z - truth().log_z, "roots": roots}

    for seed in range(3):
        yield f"gmm40/exact draws//{seed}", lambda seed=seed: measure(truth().sample(k, gen(seed)), seed)
        for name, noise in {name: multiplier(beta) for name, multiplier in PROPOSALS.items()}.items():
            for variant in VARIANTS:
                run = lambda seed=seed, noise=noise, variant=variant: corrected(seed, noise, variant)  # noqa: E731
                yield f"gmm40/{name}/{variant}/{seed}", run
        for variant in ("none", "FKC"):
            run = lambda seed=seed, variant=variant: corrected(seed, 3.0, variant, steps=1500)  # noqa: E731
            yield f"gmm40/strong Langevin/{variant}/{seed}", run
    yield (
        "gmm40/target score, resampled at each of 1000 steps, 10000 particles/FKC/0",
        lambda: corrected(0, 1.0, "FKC", steps=1000, k=10_000, ess=1.0),
    )


def lj13() -> Iterator[tuple[str, Callable[[], Row]]]:
    k, made = 1000, {}

    def cluster() -> Any:
        if not made:
            made["it"] = lennard_jones(temperature=2.0, tries=120)
        return made["it"]

    def measure(x: Tensor, beta: float, seed: int) -> Row:
        law, _ = cluster().annealed(beta)
        exact = law.sample(k, gen(1000 + seed))
        model = cluster().model
        e1, e2 = wasserstein_1d(-model.log_prob(x), -model.log_prob(exact))
        _, w2 = wasserstein(x, exact)
        nearest = torch.cdist(x, model.means).argmin(-1)
        share = torch.bincount(nearest, minlength=len(model.means)) / k
        return {"w2": w2, "e1": e1, "e2": e2, "tv": float(0.5 * (share - law.weights).abs().sum())}

    for beta in (4 / 3, 2.5):
        for seed in range(3):

            def exact(beta: float = beta, seed: int = seed) -> Row:
                return measure(cluster().annealed(beta)[0].sample(k, gen(seed)), beta, seed)

            yield f"lj13/{beta:.2f} exact draws//{seed}", exact
            strong = (3.0, 2000) if beta < 2 else (4.0, 3500)  # steps in proportion to the proposal's rate
            plans = {name: (PROPOSALS[name](beta), 400) for name in ("target score", "tempered noise")}
            for name, (noise, count) in {**plans, "strong Langevin": strong}.items():
                for variant in ("none", "FKC"):

                    def run(
                        beta: float = beta, noise: float = noise, count: int = count, variant: str = variant, seed: int = seed
                    ) -> Row:
                        x, log_z, roots = annealed(cluster().model, beta, noise, variant, (8.0, 0.01), count, k, seed)
                        return {**measure(x, beta, seed), "dlogz": log_z - cluster().annealed(beta)[1], "roots": roots}

                    yield f"lj13/{beta:.2f} {name}/{variant}/{seed}", run


def dimension() -> Iterator[tuple[str, Callable[[], Row]]]:
    """ESS without resampling, against the dimension: two laws per coordinate, d independent coordinates."""
    schedule = NoiseSchedule.vp_linear()
    times = schedule.t_of_lam(torch.linspace(float(schedule.lam(1.0)), float(schedule.lam(1e-3)), 101))
    first, second = _trio()

    def product(law: GaussianMixture) -> Any:
        one = law.denoiser(schedule)
        return lambda x, t: one(x.reshape(-1, 1), t).reshape(x.shape)

    targets = {f"cfg:{w}": Target.cfg(w) for w in (1.5, 2.0, 3.0)} | {"power:1.05": Target.guided_power(1.0, 1.05)}
    for name, target in targets.items():
        for d in (1, 4, 16, 64, 256):

            def run(target: Target = target, d: int = d) -> Row:
                models = {"uncond": product(first), "cond": product(second)}
                cloud = FeynmanKac(target, ess=0.0).sample(models, schedule, times, particles=256, shape=(d,), generator=gen(0))
                kept = FeynmanKac(target).sample(models, schedule, times, particles=256, shape=(d,), generator=gen(0))
                step = torch.stack(kept.trace.conditional_ess).min() / 256
                return {"ess": float(cloud.ess[-1]), "roots": int(kept.trace.surviving()[-1]), "worst_step": float(step)}

            yield f"dimension/{name}/{d}/0", run


def steps() -> Iterator[tuple[str, Callable[[], Row]]]:
    """Total variation of guidance 3 in one dimension against the number of steps, on two grids."""
    schedule = NoiseSchedule.vp_linear()
    first, second = _trio()
    edges = torch.linspace(-6, 6, 61, dtype=torch.float64)

    def histogram(x: Tensor, w: Tensor) -> Tensor:
        place = (torch.bucketize(x, edges) - 1).clamp(0, 59)
        return torch.zeros(60, dtype=torch.float64).scatter_add(0, place, w)

    fine = torch.linspace(-10, 10, 20001, dtype=torch.float64)
    alpha, sigma = schedule.alpha_sigma(1e-3)
    log_p = 3.0 * second.log_prob(fine[:, None], alpha, sigma) - 2.0 * first.log_prob(fine[:, None], alpha, sigma)
    truth = histogram(fine, log_p.softmax(0))
    for seed in range(3):
        for count in (10, 30, 100):
            lam = torch.linspace(float(schedule.lam(1.0)), float(schedule.lam(1e-3)), count + 1, dtype=torch.float64)
            grids = {"log SNR": schedule.t_of_lam(lam), "time": torch.linspace(1.0, 1e-3, count + 1, dtype=torch.float64)}
            for name, times in grids.items():

                def run(times: Tensor = times, seed: int = seed) -> Row:
                    models = {"uncond": first.denoiser(schedule), "cond": second.denoiser(schedule)}
                    row = {}
                    for variant in ("none", "FKC"):
                        fk = FeynmanKac(Target.cfg(3.0), **VARIANTS[variant])
                        cloud = fk.sample(models, schedule, times, particles=4000, shape=(1,), generator=gen(seed))
                        row[variant] = float(0.5 * (histogram(cloud.x[:, 0].double(), cloud.w) - truth).abs().sum())
                    return row

                yield f"steps/{name}/{count}/{seed}", run


def _trio() -> tuple[GaussianMixture, GaussianMixture]:
    u = GaussianMixture(
        torch.tensor([[-2.0], [0.0], [2.0]]), torch.tensor([0.4, 0.5, 0.4]).sqrt(), torch.tensor([0.4, 0.35, 0.25])
    )
    return u, GaussianMixture(torch.tensor([[1.6], [-1.8]]), torch.tensor([0.2, 0.25]).sqrt(), torch.tensor([0.8, 0.2]))


SECTIONS = {
    "gmm40": gmm40,
    "lj13": lj13,
    "steps": steps,
    "dimension": dimension,
    "exact": exact,
    "digits": digits,
    "cost": cost,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SECTIONS, nargs="*", default=list(SECTIONS))
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each run, at most 3")
    parser.add_argument("--render", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    done: dict[str, Row] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name in () if args.render else args.only:
        cells = [(key, run) for key, run in SECTIONS[name]() if key not in done and int(key.rsplit("/", 1)[1]) < args.seeds]
        for i, (key, run) in enumerate(cells):
            start = time.process_time()
            row = {**run(), "cpu_s": time.process_time() - start}
            done = {**(json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}), key: row}  # another run may have written
            partial = RESULTS.with_suffix(".part")
            partial.write_text(json.dumps(done, indent=0) + "\n")
            partial.replace(RESULTS)
            print(f"{i + 1}/{len(cells)} {key}: " + ", ".join(f"{n} {v:.3g}" for n, v in done[key].items()), file=sys.stderr)
    from feynman_kac_page import render

    render(done, PAGE)


if __name__ == "__main__":
    main()

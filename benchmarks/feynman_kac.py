"""Feynman-Kac correctors measured: annealed mixtures with known answers, guided digits, and what the corrector costs.

    python benchmarks/feynman_kac.py                     everything, about half an hour of one core, into docs/feynman_kac.md
    python benchmarks/feynman_kac.py --only gmm40        one section: gmm40, lj13, steps, dimension, digits, cost
    python benchmarks/feynman_kac.py --render            only write the page from the numbers at hand

Numbers are kept in benchmarks/results/feynman_kac.json, one entry per run; a run that is there is not repeated, so an
interrupted benchmark goes on where it stopped. Seeds are fixed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from feynman_kac_models import Grid, forty_gaussians, lennard_jones, mmd, wasserstein, wasserstein_1d
from torch import Tensor

import samplers.particles.native as native
from samplers import NoiseSchedule
from samplers.denoisers import GaussianMixture
from samplers.particles import FeynmanKac, Target, resample

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results" / "feynman_kac.json", HERE.parent / "docs" / "feynman_kac.md"
VARIANTS = {"none": {"weight_window": (0.0, 0.0)}, "FKC": {}, "wrong sign": {}}
PROPOSALS = {"target score": lambda beta: 1.0, "tempered noise": lambda beta: beta**-0.5, "extra Langevin": lambda beta: 1.5}
Row = dict[str, float]


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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
    model: GaussianMixture, beta: float, noise: float, variant: str, sigmas: tuple[float, float], steps: int, k: int, seed: int
) -> tuple[Tensor, float, int]:
    """Equally weighted particles for q^beta, log Z, and how many starting particles have descendants."""
    high, low = sigmas
    schedule = NoiseSchedule.edm(low, high)
    times = torch.logspace(math.log10(high), math.log10(low), steps + 1, dtype=torch.float64)
    fk = FeynmanKac(Target.power(beta), noise=noise, **VARIANTS[variant])
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

    for seed in range(3):
        yield f"gmm40/exact draws//{seed}", lambda seed=seed: measure(truth().sample(k, gen(seed)), seed)
        for name, noise in PROPOSALS.items():
            for variant in VARIANTS:

                def run(seed: int = seed, noise: float = noise(beta), variant: str = variant) -> Row:
                    x, log_z, roots = annealed(model, beta, noise, variant, (200.0, low), 500, k, seed)
                    return {
                        **measure(x[torch.randperm(k, generator=gen(seed))], seed),
                        "dlogz": log_z - truth().log_z,
                        "roots": roots,
                    }

                yield f"gmm40/{name}/{variant}/{seed}", run


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
            for name in ("target score", "tempered noise"):
                for variant in ("none", "FKC"):

                    def run(
                        beta: float = beta, noise: float = PROPOSALS[name](beta), variant: str = variant, seed: int = seed
                    ) -> Row:
                        x, log_z, roots = annealed(cluster().model, beta, noise, variant, (8.0, 0.01), 400, k, seed)
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


PER_CLASS, DIGIT_STEPS = 24, 25


class Digits:
    """The class-conditional reference pipeline, a classifier that never saw it, and real digits by class."""

    def __init__(self) -> None:
        from samplers.reference import digit_images, load
        from samplers.reference.quality import digit_classifier

        images, labels = digit_images("all")
        self.pipe, self.judge = load("digits-conditional"), digit_classifier()
        self.real = [images[labels == c].flatten(1).double() for c in range(10)]

    def measure(self, images: Tensor) -> Row:
        """Share recognised, and the mean energy distance to the real digits of the class; PER_CLASS images a class."""
        from samplers.reference.quality import recognised

        labels = [c for c in range(10) for _ in range(PER_CLASS)]
        parts = (images.flatten(1).double() * 2 - 1).split(PER_CLASS)
        distances = [energy_distance(part, real) for part, real in zip(parts, self.real, strict=True)]
        return {"accuracy": recognised(self.judge, images, labels), "distance": statistics.fmean(distances)}

    def equal_calls(self, w: float, k: int, seed: int) -> Row:
        """The same number of network calls for every K: groups of K particles, all of which are images."""
        from samplers.schedulers import swap

        labels = [c for c in range(10) for _ in range(PER_CLASS)]
        with swap(self.pipe, "euler_ancestral"), FeynmanKac(Target.cfg(w)).attach(self.pipe, k) as run:
            images = self.pipe(labels, num_inference_steps=DIGIT_STEPS, generator=gen(seed), output_type="pt").images
        log_w = run.log_w.reshape(-1, k)
        index = resample(log_w, generator=gen(seed)) + k * torch.arange(len(log_w))[:, None]
        roots = float(run.trace.surviving()[-1].double().mean())
        return {**self.measure(images[index.flatten()]), "roots": roots, "ess": float(run.ess.mean())}

    def one_per_group(self, w: float, k: int) -> Row:
        """Independent images of the law: one drawn from each of as many groups as there are images; K times the calls."""
        from samplers.schedulers import swap

        labels = [c for c in range(10) for _ in range(PER_CLASS)]
        attach = FeynmanKac(Target.cfg(w)).attach
        with swap(self.pipe, "euler_ancestral"), attach(self.pipe, k, pick="sample", expand=True):
            images = self.pipe(labels, num_inference_steps=DIGIT_STEPS, generator=gen(0), output_type="pt").images
        return self.measure(images)


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Unbiased; 0 for equal laws."""
    n, m = len(x), len(y)
    inner = torch.cdist(x, x).sum() / (n * (n - 1)) + torch.cdist(y, y).sum() / (m * (m - 1))
    return float(2 * torch.cdist(x, y).mean() - inner)


def digits() -> Iterator[tuple[str, Callable[[], Row]]]:
    made: list[Digits] = []

    def setup() -> Digits:
        return made[0] if made else made.append(Digits()) or made[0]

    for w in (2.0, 4.0):
        for k in (1, 2, 4, 8):
            yield f"one per group/{w:g}/{k}/0", lambda w=w, k=k: setup().one_per_group(w, k)
    for seed in range(2):
        for w in (1.5, 2.0, 3.0, 4.0):
            for k in (1, 2, 4, 8):
                yield f"digits/{w:g}/{k}/{seed}", lambda w=w, k=k, seed=seed: setup().equal_calls(w, k, seed)


def cost() -> Iterator[tuple[str, Callable[[], Row]]]:
    """Time and memory of the corrector itself, per step, next to one evaluation of a U-Net at 64 x 64 latents."""

    def run() -> Row:
        from diffusers import DDIMScheduler, UNet2DConditionModel

        from samplers.particles.hooks.branches import Catcher
        from samplers.particles.hooks.plans import plan_of
        from samplers.particles.hooks.run import Call, Steps

        k, repeats = 8, 30
        # A quarter of Stable Diffusion's width: a sixteenth of its work, so the share measured here is an upper bound.
        unet = UNet2DConditionModel(
            sample_size=64, block_out_channels=(80, 160, 320, 320), cross_attention_dim=192, norm_num_groups=20
        )
        latents, text = torch.randn(2 * k, 4, 64, 64), torch.randn(2 * k, 77, 192)
        with torch.no_grad():
            start = time.process_time()
            output = unet(latents, 500, text).sample
            network = time.process_time() - start
        scheduler = DDIMScheduler(clip_sample=False)
        scheduler.set_timesteps(repeats + 1)
        plan = plan_of(scheduler, exact=True, resamples=True, eta=1.0)
        catcher = Catcher(unet)
        settings = FeynmanKac(Target.cfg(2.0), ess=1.0)
        steps = Steps(settings, Call(k, 2.0, gen(0), "all", lambda x: x), catcher, scheduler, plan)
        mixed = output[:k] + 2.0 * (output[k:] - output[:k])
        spent = []
        for t in scheduler.timesteps[:repeats]:
            catcher.outputs = [output]
            start = time.process_time()
            steps.step(lambda out, t, x: (x,), mixed, t, latents[:k])
            spent.append(time.process_time() - start)
        held = sum(len(v) * v[0].numel() * v[0].element_size() for v in vars(steps.population.trace).values())
        corrector = statistics.median(spent)
        return {
            "network_s": network,
            "corrector_s": corrector,
            "share": corrector / network,
            "trace_bytes_per_step": held / repeats,
        }

    yield "cost/sd-quarter/8/0", run


SECTIONS = {"gmm40": gmm40, "lj13": lj13, "steps": steps, "dimension": dimension, "digits": digits, "cost": cost}


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
            done[key] = {**run(), "cpu_s": time.process_time() - start}
            partial = RESULTS.with_suffix(".part")
            partial.write_text(json.dumps(done, indent=0) + "\n")
            partial.replace(RESULTS)
            print(f"{i + 1}/{len(cells)} {key}: " + ", ".join(f"{n} {v:.3g}" for n, v in done[key].items()), file=sys.stderr)
    from feynman_kac_page import render

    render(done, PAGE)


if __name__ == "__main__":
    main()

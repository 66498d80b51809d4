r"""Guided digits for `feynman_kac.py`: the class-conditional reference pipeline, and an exact model of the same digits.

The exact model is a mixture of three Gaussians a class, fitted to the real digits in their 64 pixels, so that every score is
known and the law that guidance names can be drawn from: it is $q^{1-w} q_c^w \propto q_c\,p(c|x)^{w-1}$, so draws of $q_c$
that are kept with probability $p(c|x)^{w-1}$ follow it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from sklearn.calibration import CalibratedClassifierCV
from sklearn.mixture import GaussianMixture as Fit
from sklearn.svm import SVC
from torch import Tensor

from samplers import NoiseSchedule
from samplers.denoisers import GaussianMixture
from samplers.evaluation import frechet_distance
from samplers.particles import FeynmanKac, Target, resample
from samplers.reference import digit_images, load
from samplers.schedulers import swap

Row = dict[str, float]
Cell = tuple[str, Callable[[], Row]]
CLASSES = range(10)
SAMPLER = "euler_ancestral:grid=logsnr"  # the default grid ends with steps too long to weigh
# (K, steps) of equal network calls per image, and the images of each class
BUDGETS = {100: (((1, 100), (2, 50), (4, 25), (8, 12)), 20), 400: (((1, 400), (2, 200), (4, 100), (8, 50)), 10)}


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Unbiased; 0 for equal laws."""
    n, m = len(x), len(y)
    inner = torch.cdist(x, x).sum() / (n * (n - 1)) + torch.cdist(y, y).sum() / (m * (m - 1))
    return float(2 * torch.cdist(x, y).mean() - inner)


def spread(x: Tensor) -> float:
    """Mean distance between two points."""
    return float(torch.cdist(x, x).sum() / (len(x) * (len(x) - 1)))


# ---- the network --------------------------------------------------------------------------------------------------------


class Network:
    """The class-conditional reference pipeline, a classifier that never saw it, and real digits by class."""

    def __init__(self) -> None:
        images, labels = digit_images("all")
        seen, seen_labels = digit_images("train")
        self.pipe = load("digits-conditional")
        self.pipe.set_progress_bar_config(disable=True)
        judge = CalibratedClassifierCV(SVC(gamma=0.02), ensemble=False)
        self.judge = judge.fit(seen.flatten(1).numpy(), seen_labels.numpy())
        self.real = [images[labels == c].flatten(1).double() for c in CLASSES]

    def measure(self, x: Tensor, per_class: int) -> Row:
        """Of ``x`` (10 per_class, 64) in [-1, 1], ordered by class.

        The share recognised, the mean log-probability of the label, and against the real digits: the mean over classes of the
        energy distance and of the ratio of spreads, and the Frechet distance in pixels of all classes together.
        """
        parts, labels = x.split(per_class), torch.tensor([c for c in CLASSES for _ in range(per_class)])
        p = torch.from_numpy(self.judge.predict_proba(x.numpy()))
        every = torch.cat(self.real)
        return {
            "accuracy": float((p.argmax(-1) == labels).double().mean()),
            "log_p": float(p[torch.arange(len(x)), labels].clamp(min=1e-6).log().mean()),
            "distance": statistics.fmean(energy_distance(a, b) for a, b in zip(parts, self.real, strict=True)),
            "frechet": frechet_distance(*(m.numpy() for y in (x, every) for m in (y.mean(0), y.T.cov()))),
            "spread": statistics.fmean(spread(a) / spread(b) for a, b in zip(parts, self.real, strict=True)),
        }

    def sample(self, w: float, k: int, steps: int, per_class: int, seed: int, **options: Any) -> tuple[Tensor, Any]:
        """Images (N, 64) of every class in order, and the run."""
        labels = [c for c in CLASSES for _ in range(per_class)]
        with swap(self.pipe, SAMPLER), FeynmanKac(Target.cfg(w)).attach(self.pipe, k, **options) as run:
            images = self.pipe(labels, num_inference_steps=steps, generator=gen(seed), output_type="pt").images
        return images.flatten(1).double() * 2 - 1, run

    def all_kept(self, w: float, k: int, seed: int, per_class: int = 24, steps: int = 25) -> Row:
        """Groups of K particles, all of which are images: the same calls for every K."""
        x, run = self.sample(w, k, steps, per_class, seed)
        log_w = run.log_w.reshape(-1, k)
        index = resample(log_w, generator=gen(seed)) + k * torch.arange(len(log_w))[:, None]
        return {**self.measure(x[index.flatten()], per_class), "roots": float(run.trace.surviving()[-1].double().mean())}

    def one_kept(self, w: float, k: int, steps: int, per_class: int, seed: int) -> Row:
        """One image drawn from each group of K."""
        x, run = self.sample(w, k, steps, per_class, seed, pick="sample", expand=True)
        return {**self.measure(x, per_class), "ess": float(run.ess.min(0).values.mean()) / k}

    def held_out(self, per_class: int, seed: int) -> Row:
        """The same figures of as many real digits that the classifier was not trained on."""
        images, labels = digit_images("test")
        rows = [(labels == c).nonzero()[:, 0] for c in CLASSES]
        chosen = [r[torch.randperm(len(r), generator=gen(seed))[:per_class]] for r in rows]
        return self.measure(images[torch.cat(chosen)].flatten(1).double(), per_class)


def once(build: Callable[[], Any]) -> Callable[[], Any]:
    made: list[Any] = []
    return lambda: made[0] if made else made.append(build()) or made[0]


def digits() -> Iterator[Cell]:
    setup = once(Network)

    def kept_one(calls: int, scales: tuple[float, ...]) -> Iterator[Cell]:
        cells, n = BUDGETS[calls]
        yield f"digits one/{calls} real//0", lambda: setup().held_out(n, 0)
        for w in scales:
            for k, steps in cells:
                run = lambda w=w, k=k, steps=steps: setup().one_kept(w, k, steps, n, 0)  # noqa: E731
                yield f"digits one/{calls} {w:g}/{k} x {steps}/0", run

    yield from kept_one(100, (1.5, 2.0, 3.0, 4.0))
    for w in (1.5, 2.0, 3.0, 4.0):
        for k in (1, 2, 4, 8):
            yield f"digits all/{w:g}/{k}/0", lambda w=w, k=k: setup().all_kept(w, k, 0)
    yield from kept_one(400, (2.0, 4.0))


# ---- the exact model ----------------------------------------------------------------------------------------------------


class Exact:
    """Mixtures fitted to the digits of each class, and to all of them."""

    def __init__(self) -> None:
        images, labels = digit_images("all")
        x = images.flatten(1).double()
        fits = [Fit(3, reg_covar=0.02, random_state=0).fit(x[labels == c].numpy()) for c in CLASSES]
        parts = [tuple(map(torch.from_numpy, (f.means_, f.covariances_, f.weights_))) for f in fits]
        self.classes = [GaussianMixture(m, covariances=c, weights=w) for m, c, w in parts]
        means, covariances, weights = (torch.cat(part) for part in zip(*parts, strict=True))
        self.every = GaussianMixture(means, covariances=covariances, weights=weights / 10)
        self.schedule = NoiseSchedule.vp_linear()

    def log_class(self, x: Tensor, c: int) -> Tensor:
        """log p(c|x) (B,)."""
        return self.classes[c].log_prob(x) - self.every.log_prob(x) - math.log(10.0)

    def named(self, w: float, c: int, n: int, seed: int) -> Tensor:
        """Independent draws (n, 64) of the law that guidance names."""
        g, kept = gen(seed), torch.zeros(0, 64, dtype=torch.float64)
        while len(kept) < n:
            x = self.classes[c].sample(n, g).double()
            accepted = torch.rand(n, generator=g, dtype=torch.float64) < ((w - 1) * self.log_class(x, c)).exp()
            kept = torch.cat([kept, x[accepted]])
        return kept[:n]

    def measure(self, parts: list[Tensor], w: float) -> Row:
        """Mean over classes of the energy distance to the named law, and of the ratio of spreads."""
        truth = [self.named(w, c, 1500, 1000 + c) for c in CLASSES]
        return {
            "distance": statistics.fmean(energy_distance(a, b) for a, b in zip(parts, truth, strict=True)),
            "spread": statistics.fmean(spread(a) / spread(b) for a, b in zip(parts, truth, strict=True)),
        }

    def run(self, w: float, k: int, steps: int, seed: int, per_class: int = 40) -> Row:
        """One particle of each of ``per_class`` groups, for every class."""
        ends = [float(self.schedule.lam(t)) for t in (1.0, 1e-3)]
        times = self.schedule.t_of_lam(torch.linspace(*ends, steps + 1, dtype=torch.float64))
        every, parts, off, ess = self.every.denoiser(self.schedule), [], [], []
        for c, law in enumerate(self.classes):
            cloud = FeynmanKac(Target.cfg(w)).sample(
                {"uncond": every, "cond": law.denoiser(self.schedule)}, self.schedule, times, particles=k, groups=per_class,
                shape=(64,), generator=gen(100 * seed + c),
            )  # fmt: skip
            parts.append(cloud.pick("sample", gen(100 * seed + 50 + c)).double())
            # the classes hardly overlap, so the named law's normaliser is that of q_c (q_c / q)^(w - 1) with q_c / q = 10
            off.append(float(cloud.log_z.exp().mean().log()) - (w - 1) * math.log(10.0))
            ess.append(float((cloud.ess / k).min(0).values.mean()))
        return {**self.measure(parts, w), "dlogz": statistics.fmean(off), "ess": statistics.fmean(ess)}

    def floor(self, w: float, seed: int, per_class: int = 40) -> Row:
        return self.measure([self.named(w, c, per_class, 5000 + 100 * seed + c) for c in CLASSES], w)


def exact() -> Iterator[Cell]:
    setup = once(Exact)
    for w in (2.0, 4.0):
        for seed in range(3):
            yield f"exact digits/{w:g}/exact draws/{seed}", lambda w=w, seed=seed: setup().floor(w, seed)
        for seed in range(2):
            for k, steps in ((1, 100), (2, 50), (4, 25), (8, 12), (1, 800), (2, 400), (4, 200), (8, 100)):
                run = lambda w=w, k=k, steps=steps, seed=seed: setup().run(w, k, steps, seed)  # noqa: E731
                yield f"exact digits/{w:g}/{k} x {steps}/{seed}", run

"""Part 1 of the minority benchmark: a 64-dimensional mixture with exact scores, so that only guidance can err."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from minority_record import Row, named
from scipy.stats import chi2
from sklearn.metrics import roc_auc_score
from torch import Tensor

from samplers import NoiseSchedule, SolverSchedule, recipe, sample
from samplers.denoisers import GaussianMixture
from samplers.guidance import (
    FitSettings,
    MinorityClassifier,
    MinorityScorer,
    boost_gain,
    equal_count_bins,
    fit,
    guided_denoiser,
    top_eigenvalue,
)
from samplers.recipes import canonical

DIM, MODES, RARE_WEIGHT, APART, POINTS, COUNT, STEPS, FEW = 64, 6, 0.03, 16.0, 20_000, 1000, 100, 10
FIT = {"steps": 400, "batch_size": 256, "lr": 2e-3}


def schedule_of(text: str, noise: NoiseSchedule, nfe: int) -> SolverSchedule:
    """Recipe text, a JSON schedule or a shipped name."""
    schedule = recipe(text, noise, nfe) if canonical(text) else SolverSchedule.load(text)
    if schedule.nfe != nfe:
        raise ValueError(f"{text} makes {schedule.nfe} network evaluations, this row {nfe}")
    return schedule


class Mixture:
    """Six modes 16 within-mode standard deviations from the origin, the last of weight 3%; unit mean variance."""

    def __init__(self, seed: int) -> None:
        self.seed, self.noise = seed, NoiseSchedule.vp_linear()
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(MODES, DIM, generator=generator, dtype=torch.float64)
        means = APART * directions / directions.norm(dim=1, keepdim=True)
        weights = torch.tensor([(1 - RARE_WEIGHT) / (MODES - 1)] * (MODES - 1) + [RARE_WEIGHT])
        wide = GaussianMixture(means, torch.ones(MODES), weights)
        self.std = wide.covariance.diagonal().mean().rsqrt().item()
        self.law = GaussianMixture(means * self.std, torch.full((MODES,), self.std), weights)
        self.data = self.law.sample(POINTS, generator).float()
        self.denoiser = self.law.denoiser(self.noise)

    def measure(self, x: Tensor) -> dict[str, float]:
        """Rare share, mean log density, share on the manifold."""
        distance = torch.cdist(x.double(), self.law.means)
        nearest = distance.amin(1) / self.std
        return {
            "rare": (distance.argmin(1) == MODES - 1).double().mean().item(),
            "log_p": self.law.log_prob(x).mean().item(),
            "on_manifold": (nearest.square() < chi2.ppf(0.999, DIM)).double().mean().item(),
        }

    def scorer(self, t: float | None, draws: int) -> MinorityScorer:
        level = "auto" if t is None else self.noise.alpha(t).item() ** 2
        return MinorityScorer(self.denoiser, self.noise, level, draws).calibrated(self.data)

    def labels(self, t: float | None) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + 100)
        return equal_count_bins(self.scorer(t, 5)(self.data, generator), 10)

    def classifier(self, labels: Tensor) -> MinorityClassifier:
        classifier = MinorityClassifier((DIM,), 10, width=128, depth=2, seed=self.seed)
        fit(classifier, self.data, labels, self.noise, FitSettings(**FIT, seed=self.seed))
        return classifier

    def draw(self, text: str, nfe: int, classifier: Any = None, count: int = COUNT, **guidance: Any) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + 200)
        schedule, denoiser = schedule_of(text, self.noise, nfe), self.denoiser
        if classifier is not None:
            denoiser = guided_denoiser(denoiser, self.noise, classifier, times=schedule.times, **guidance)
        return sample(denoiser, torch.randn(count, DIM, generator=generator), schedule, self.noise, generator=generator)

    def rejection(self, candidates: int, nfe: int) -> Tensor:
        """The rarest of ``candidates`` draws of ``nfe`` evaluations each."""
        drawn = self.draw("ddpm", nfe, count=COUNT * candidates)
        scores = self.scorer(None, 5)(drawn, torch.Generator().manual_seed(self.seed + 300))
        return drawn[scores.topk(COUNT).indices]

    def boosted(self, skip: int) -> tuple[Tensor, float]:
        schedule = recipe("ddpm", self.noise, STEPS).tail(skip)
        generator = torch.Generator().manual_seed(self.seed + 400)
        x = 4.0 * torch.randn(COUNT, DIM, generator=generator)
        level = self.noise.alpha(schedule.times[0]).item() ** 2
        return sample(self.denoiser, x, schedule, self.noise, generator=generator), boost_gain(
            level, top_eigenvalue(self.data), 4.0
        )

    def auc(self, t: float | None) -> float:
        is_rare = torch.cdist(self.data.double(), self.law.means).argmin(1) == MODES - 1
        rows = torch.cat([is_rare.nonzero().flatten()[:500], (~is_rare).nonzero().flatten()[:3000]])
        scores = self.scorer(t, 20)(self.data[rows], torch.Generator().manual_seed(self.seed + 500))
        return float(roc_auc_score(is_rare[rows], scores))


def rows(seed: int, samplers: list[str], cache: Path) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Names of the table's rows and what computes them; nothing is slow enough to need the ``cache``."""
    problem, kept = Mixture(seed), {}

    def trained(name: str) -> MinorityClassifier:
        if name not in kept:
            labels = problem.labels(0.2 if name == "wrong level" else None)
            if name == "shuffled":
                labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
            kept[name] = problem.classifier(labels)
        return kept[name]

    def guided(text: str = "ddpm", nfe: int = STEPS, name: str = "right", **guidance: Any) -> Callable[[], Row]:
        return lambda: problem.measure(problem.draw(text, nfe, trained(name), **guidance))

    yield "data", lambda: problem.measure(problem.data)
    yield "rarest tenth of the data", lambda: problem.measure(problem.data[problem.labels(None) == 9])
    yield "AUC of the score, 20 draws", lambda: {"auc": problem.auc(None)}
    yield "AUC at the wrong level", lambda: {"auc": problem.auc(0.2)}
    yield f"unguided, {STEPS} NFE", lambda: problem.measure(problem.draw("ddpm", STEPS))
    yield f"rejection, 1 of 10 at {STEPS // 10} NFE", lambda: problem.measure(problem.rejection(10, STEPS // 10))
    for w in (1.0, 2.0, 4.0, 8.0):
        yield f"rarest bin, w={w:g}", guided(scale=w)
    yield "rarest bin, w=4, mean form", guided(scale=4.0, form="mean")
    yield "rarest bin, w=4, ddim", guided("ddim", scale=4.0)
    yield "bin 5, w=4", guided(scale=4.0, label=5)
    yield "bin 0, w=4", guided(scale=4.0, label=0)
    yield "shuffled labels, w=4 (control)", guided(name="shuffled", scale=4.0)
    yield "wrong level, w=4 (control)", guided(name="wrong level", scale=4.0)
    for skip in (30, 40):
        yield f"Boost-and-Skip, gamma=4, skip {skip}", lambda skip=skip: problem.measure(problem.boosted(skip)[0])
    for text in samplers:
        yield f"unguided, {named(text)}, {FEW} NFE", lambda text=text: problem.measure(problem.draw(text, FEW))
        for w in (4.0, 8.0):
            yield f"rarest bin, w={w:g}, {named(text)}, {FEW} NFE", guided(text, FEW, scale=w)

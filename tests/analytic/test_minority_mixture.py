"""Minority guidance on a 64-dimensional mixture with exact scores: the gates that say it works, with their controls."""

from dataclasses import dataclass
from functools import cached_property

import pytest
import torch
from scipy.stats import chi2
from sklearn.metrics import roc_auc_score
from torch import Tensor

from samplers import NoiseSchedule, recipe, sample
from samplers.denoisers import GaussianMixture
from samplers.guidance import (
    FitSettings,
    MinorityClassifier,
    MinorityScorer,
    alpha_bar_of_snr,
    bins_within,
    equal_count_bins,
    fit,
    guided_denoiser,
    top_eigenvalue,
)
from samplers.guidance.boosting import boost_gain

DIM, MODES, RARE_WEIGHT, APART = 64, 6, 0.03, 16.0
STEPS, COUNT = 50, 500
FIT = FitSettings(steps=300, batch_size=256, lr=2e-3)


@dataclass
class Problem:
    """Six modes 16 standard deviations from the origin, the last of weight 3%; unit mean variance."""

    noise: NoiseSchedule

    @cached_property
    def law(self) -> GaussianMixture:
        generator = torch.Generator().manual_seed(0)
        directions = torch.randn(MODES, DIM, generator=generator, dtype=torch.float64)
        means = APART * directions / directions.norm(dim=1, keepdim=True)
        weights = torch.tensor([(1 - RARE_WEIGHT) / (MODES - 1)] * (MODES - 1) + [RARE_WEIGHT])
        wide = GaussianMixture(means, torch.ones(MODES), weights)
        self.std = wide.covariance.diagonal().mean().rsqrt().item()
        return GaussianMixture(means * self.std, torch.full((MODES,), self.std), weights)

    @cached_property
    def data(self) -> Tensor:
        return self.law.sample(20_000, torch.Generator().manual_seed(1)).float()

    @cached_property
    def is_rare(self) -> Tensor:
        return self.mode(self.data) == MODES - 1

    def mode(self, x: Tensor) -> Tensor:
        return torch.cdist(x.double(), self.law.means).argmin(1)

    def rare_share(self, x: Tensor) -> float:
        return (self.mode(x) == MODES - 1).double().mean().item()

    def on_manifold(self, x: Tensor) -> float:
        nearest = torch.cdist(x.double(), self.law.means).amin(1) / self.std
        return (nearest.square() < chi2.ppf(0.999, DIM)).double().mean().item()

    def scores(self, level: float, draws: int = 5) -> Tensor:
        scorer = MinorityScorer(self.law.denoiser(self.noise), self.noise, level, draws)
        return scorer(self.data, torch.Generator().manual_seed(2))

    def labels(self, level: float) -> Tensor:
        return equal_count_bins(self.scores(level), 10)

    def classifier(self, labels: Tensor) -> MinorityClassifier:
        classifier = MinorityClassifier((DIM,), 10, width=128, depth=2)
        fit(classifier, self.data, labels, self.noise, FIT)
        return classifier

    def run(self, text: str = "ddpm", seed: int = 3, **guidance: object) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        schedule = recipe(text, self.noise, STEPS)
        denoiser = self.law.denoiser(self.noise)
        if guidance:
            denoiser = guided_denoiser(denoiser, self.noise, times=schedule.times, **guidance)
        x = torch.randn(COUNT, DIM, generator=generator)
        return sample(denoiser, x, schedule, self.noise, generator=generator)


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem(NoiseSchedule.vp_linear())


@pytest.fixture(scope="module")
def level(problem) -> float:
    return alpha_bar_of_snr(0.4, top_eigenvalue(problem.data))


@pytest.fixture(scope="module")
def classifier(problem, level) -> MinorityClassifier:
    return problem.classifier(problem.labels(level))


def test_auto_level_follows_the_signal_to_noise_rule(problem, level):
    scorer = MinorityScorer(problem.law.denoiser(problem.noise), problem.noise).calibrated(problem.data)
    assert scorer.level == pytest.approx(level)
    assert level == pytest.approx(problem.noise.alpha(0.6).item() ** 2, rel=0.05)


def test_score_at_the_right_level_finds_the_rare_mode_and_at_the_wrong_one_does_not(problem, level):
    rare = problem.is_rare.nonzero().flatten()[:300]
    rows = torch.cat([rare, (~problem.is_rare).nonzero().flatten()[:1500]])
    found = {}
    for name, at in (("mode", level), ("wrong", problem.noise.alpha(0.2).item() ** 2)):
        scorer = MinorityScorer(problem.law.denoiser(problem.noise), problem.noise, at, 20)
        scores = scorer(problem.data[rows], torch.Generator().manual_seed(4))
        found[name] = roc_auc_score(problem.is_rare[rows], scores)
    assert found["mode"] >= 0.95
    assert 0.4 <= found["wrong"] <= 0.6


@pytest.mark.slow
class TestGates:
    """Standard errors of shares are at most 0.022 (500 samples)."""

    def test_unguided(self, problem):
        out = problem.run()
        assert problem.rare_share(out) <= 0.06
        assert problem.on_manifold(out) >= 0.98

    def test_rarest_bin(self, problem, classifier):
        out = problem.run(classifier=classifier, scale=4.0)
        assert problem.rare_share(out) >= 0.40
        assert problem.on_manifold(out) >= 0.98

    def test_commonest_bin(self, problem, classifier):
        assert problem.rare_share(problem.run(classifier=classifier, scale=4.0, label=0)) <= 0.01

    def test_bins_move_the_score_monotonically(self, problem, classifier, level):
        """Judged by the exact law, not by the score that guided: the share of the rare mode."""
        shares = [problem.rare_share(problem.run(classifier=classifier, scale=2.0, label=bin_)) for bin_ in (0, 8, 9)]
        assert shares[0] <= shares[1] + 0.02
        assert shares[1] < shares[2]

    def test_eps_and_mean_forms_agree(self, problem, classifier):
        shares = [problem.rare_share(problem.run(classifier=classifier, scale=4.0, form=form)) for form in ("eps", "mean")]
        assert abs(shares[0] - shares[1]) <= 0.15

    def test_shuffled_labels_do_nothing(self, problem, level):
        labels = problem.labels(level)
        shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(5))]
        out = problem.run(classifier=problem.classifier(shuffled), scale=4.0)
        assert abs(problem.rare_share(out) - problem.rare_share(problem.run())) <= 0.04

    def test_wrong_level_does_nothing(self, problem):
        labels = problem.labels(problem.noise.alpha(0.2).item() ** 2)
        out = problem.run(classifier=problem.classifier(labels), scale=4.0)
        assert abs(problem.rare_share(out) - problem.rare_share(problem.run())) <= 0.04

    def test_ten_evaluations(self, problem, classifier):
        generator = torch.Generator().manual_seed(3)
        denoiser = guided_denoiser(problem.law.denoiser(problem.noise), problem.noise, classifier, 4.0)
        x = torch.randn(COUNT, DIM, generator=generator)
        out = sample(denoiser, x, recipe("ddpm", problem.noise, 10), problem.noise, generator=generator)
        assert problem.rare_share(out) >= 0.40
        assert problem.on_manifold(out) >= 0.98

    def test_boost_and_skip_raises_the_share_a_little_and_stays_on_the_manifold(self, problem):
        schedule = recipe("ddpm", problem.noise, 100).tail(40)
        generator = torch.Generator().manual_seed(6)
        x = 4.0 * torch.randn(4 * COUNT, DIM, generator=generator)
        out = sample(problem.law.denoiser(problem.noise), x, schedule, problem.noise, generator=generator)
        gain = boost_gain(problem.noise.alpha(schedule.times[0]).item() ** 2, top_eigenvalue(problem.data), 4.0)
        assert 3.0 < gain < 6.0
        assert problem.rare_share(out) >= 1.5 * RARE_WEIGHT
        assert problem.on_manifold(out) >= 0.98


@pytest.mark.slow
def test_rare_within_a_class(problem):
    """Two classes of three modes, each with its own rare one; the classifier is told the class, and so is the denoiser."""
    weights = torch.tensor([0.5, 0.44, 0.06], dtype=torch.float64)
    laws = [GaussianMixture(problem.law.means[k : k + 3], torch.full((3,), problem.std), weights) for k in (0, 3)]
    data = torch.cat([law.sample(6000, torch.Generator().manual_seed(k)).float() for k, law in enumerate(laws)])
    classes = torch.arange(len(data)) // 6000
    scores = []
    for k, law in enumerate(laws):
        scorer = MinorityScorer(law.denoiser(problem.noise), problem.noise, draws=5)
        scores.append(scorer(data[classes == k], torch.Generator().manual_seed(2)))
    labels = bins_within(torch.cat(scores), classes, 10)
    classifier = MinorityClassifier((DIM,), 10, width=128, depth=2, classes=2)
    fit(classifier, data, labels, problem.noise, FIT, class_labels=classes)
    for k, law in enumerate(laws):
        shares = []
        for scale in (0.0, 4.0):
            generator, which = torch.Generator().manual_seed(3), torch.full((COUNT,), k)
            denoiser = guided_denoiser(law.denoiser(problem.noise), problem.noise, classifier, scale, class_labels=which)
            x = torch.randn(COUNT, DIM, generator=generator)
            out = sample(denoiser, x, recipe("ddpm", problem.noise, STEPS), problem.noise, generator=generator)
            shares.append((problem.mode(out) == 3 * k + 2).double().mean().item())
            assert problem.on_manifold(out) >= 0.98
        assert shares[0] <= 0.10
        assert shares[1] >= 0.30


def test_zero_scale_and_empty_window_are_bit_identical(problem):
    untrained = MinorityClassifier((DIM,), 10, width=16, depth=1)
    generator, schedule = torch.Generator(), recipe("unipc:order=3", problem.noise, 5)
    x = torch.randn(8, DIM, generator=generator.manual_seed(0))
    base = problem.law.denoiser(problem.noise)
    expected = sample(base, x, schedule, problem.noise)
    still = guided_denoiser(base, problem.noise, untrained, 0.0)
    assert torch.equal(sample(still, x, schedule, problem.noise), expected)
    outside = guided_denoiser(base, problem.noise, untrained, 4.0, window=(0.9999999, 1.0))
    assert torch.equal(sample(outside, x, schedule, problem.noise), expected)
    inside = guided_denoiser(base, problem.noise, untrained, 4.0)
    assert not torch.equal(sample(inside, x, schedule, problem.noise), expected)

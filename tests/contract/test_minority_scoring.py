"""Scores, bins, classifiers and their files: what they promise."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from samplers import NoiseSchedule
from samplers.denoisers import GaussianMixture
from samplers.guidance import (
    FitSettings,
    MinorityClassifier,
    MinorityScorer,
    bins_within,
    equal_count_bins,
    feature_distance,
    fit,
    kind_shares,
    label_mask,
    lpips,
    missing_kinds,
    read_scores,
    score_dataset,
    split_rarest,
    top_eigenvalue,
)

NOISE = NoiseSchedule.vp_linear()
LAW = GaussianMixture(torch.tensor([[2.0, 0, 0, 0], [-2.0, 0, 0, 0]]), torch.tensor([0.3, 0.3]), torch.tensor([0.9, 0.1]))


@pytest.fixture
def data(generator) -> Tensor:
    return LAW.sample(120, generator()).float()


@pytest.fixture
def scorer(data) -> MinorityScorer:
    return MinorityScorer(LAW.denoiser(NOISE), NOISE, draws=2).calibrated(data)


def test_score_is_the_weighted_error_of_the_noise_prediction(data):
    """Squared error: l = (sigma^2 / alpha^2) |eps_hat - eps|^2, one term of the evidence bound."""
    t = torch.tensor(0.5, dtype=torch.float64)
    alpha, sigma = (v.item() for v in NOISE.alpha_sigma(t))
    found = MinorityScorer(LAW.denoiser(NOISE), NOISE, alpha**2, draws=1)(data, torch.Generator().manual_seed(4))
    eps = torch.randn(data.shape, generator=torch.Generator().manual_seed(4))
    x = alpha * data + sigma * eps
    eps_hat = -sigma * LAW.score(x, alpha, sigma)
    torch.testing.assert_close(found, (sigma / alpha) ** 2 * (eps_hat - eps).square().sum(1), rtol=1e-4, atol=1e-4)


def test_l1_features_and_functions_of_two_batches(data, generator):
    def score(distance) -> Tensor:
        return MinorityScorer(LAW.denoiser(NOISE), NOISE, 0.2, 1, distance)(data, generator(1))

    l2 = score("l2")
    torch.testing.assert_close(score(feature_distance(lambda x: 3 * x)), 9 * l2)
    torch.testing.assert_close(score(lambda x, y: (x - y).square().sum(1)), l2)
    assert (score("l1") >= l2.sqrt() - 1e-5).all()
    with pytest.raises(ValueError, match="must give shape"):
        score(lambda x, y: x - y)


def test_scores_repeat_with_the_generator_and_keep_float64(data, scorer, generator):
    assert torch.equal(scorer(data, generator(3)), scorer(data, generator(3)))
    assert not torch.equal(scorer(data, generator(3)), scorer(data, generator(4)))
    assert scorer(data.double(), generator()).dtype == torch.float64
    assert scorer(data.half(), generator()).dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"level": 1.5}, r"alpha_bar must lie in \(0, 1\)"),
        ({"level": "high"}, "'auto' or alpha_bar"),
        ({"draws": 0}, "draws"),
        ({"distance": "cosine"}, "known: l2, l1, lpips"),
        ({"target": "weird"}, "known: mode, typicality"),
        ({"clip": -1.0}, "clip"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MinorityScorer(LAW.denoiser(NOISE), NOISE, **arguments)


def test_auto_level_needs_samples_that_differ(data):
    scorer = MinorityScorer(LAW.denoiser(NOISE), NOISE)
    with pytest.raises(ValueError, match="at least two samples"):
        scorer(data[:1])
    with pytest.raises(ValueError, match="all samples are alike"):
        scorer(data[:1].repeat(3, 1))
    with pytest.raises(ValueError, match="floating-point"):
        scorer(data.long())


def test_typicality_looks_at_less_noise(data):
    mode, typical = (MinorityScorer(LAW.denoiser(NOISE), NOISE, target=t).level_for(data) for t in ("mode", "typicality"))
    assert typical > 4 * mode
    variance = top_eigenvalue(data)
    assert mode * variance / (1 - mode) == pytest.approx(0.4)


def test_top_eigenvalue_of_data_too_wide_to_decompose(generator, monkeypatch):
    monkeypatch.setattr("samplers.guidance.levels._EXACT_UP_TO", 10)
    x = torch.randn(200, 210, generator=generator()) * torch.linspace(1, 3, 210)
    exact = torch.linalg.svdvals(x.double() - x.double().mean(0))[0].square().item() / 199
    assert top_eigenvalue(x) == pytest.approx(exact, rel=1e-6)


def test_missing_lpips_weights_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"vgg16.*distance='l2'"):
        MinorityScorer(LAW.denoiser(NOISE), NOISE, 0.1, distance="lpips")
    with pytest.raises(ValueError, match="known: vgg, alex, squeeze"):
        lpips("resnet")


def test_bins_have_equal_counts_and_the_last_is_the_rarest():
    scores = torch.tensor([3.0, 1.0, 2.0, 2.0, 9.0, 0.0, 5.0])
    assert equal_count_bins(scores, 3).tolist() == [1, 0, 0, 1, 2, 0, 2]
    counts = equal_count_bins(torch.zeros(1003), 10).bincount()
    assert counts.max() - counts.min() <= 1
    with pytest.raises(ValueError, match=r"2\.\.7"):
        equal_count_bins(scores, 8)
    with pytest.raises(ValueError, match="finite"):
        equal_count_bins(torch.tensor([1.0, float("nan")]), 2)


def test_bins_within_classes_are_balanced_in_every_class(generator):
    scores, classes = torch.rand(400, generator=generator()), torch.arange(400) % 4
    scores += 10 * classes
    labels = bins_within(scores, classes, 5)
    for label in range(4):
        assert labels[classes == label].bincount().tolist() == [20] * 5


def test_split_of_the_rarest_bin_finds_kinds(generator):
    labels = torch.arange(200) % 10
    kinds = torch.arange(20) % 2
    residuals = torch.randn(20, 6, generator=generator()) * 0.1
    residuals[kinds == 0, 0] += 1
    residuals[kinds == 1, 3] -= 5  # another length: only the direction counts
    split = split_rarest(labels, residuals, 2)
    parts = split[labels == 9] - 9
    assert torch.equal(parts, kinds) or torch.equal(parts, 1 - kinds)
    assert torch.equal(split[labels < 9], labels[labels < 9])


def test_shares_of_kinds_tell_what_a_model_leaves_out():
    """Classifier probabilities that are known: kind 0 is a positive first value, kind 1 a negative one, half each of them."""

    class Known:
        bins, parts, classes = 2, 2, None

        def log_prob(self, x, alpha, sigma, class_labels=None):
            positive = (x[:, :1] > 0).double()
            return torch.cat([torch.full_like(positive, 0.5), positive / 2, (1 - positive) / 2], dim=1).log()

    data = torch.full((40, 3), 5.0)
    data[10:] = -5.0
    shares = kind_shares(Known(), data, batch_size=16)
    torch.testing.assert_close(shares, torch.tensor([0.125, 0.375], dtype=torch.float64))
    assert missing_kinds(shares, torch.tensor([0.1, 0.1])) == "part:1"
    assert missing_kinds(shares, torch.tensor([0.01, 0.3]), 2) == "part:0,1"
    # A hundredth of a small kind and a tenth of a large one: the latter is less likely to be chance.
    assert missing_kinds(torch.tensor([0.01, 0.3]), torch.tensor([0.0001, 0.03])) == "part:1"
    for bad in (0, 3):
        with pytest.raises(ValueError, match=r"1\.\.2"):
            missing_kinds(shares, shares, bad)
    with pytest.raises(ValueError, match="samples"):
        kind_shares(Known(), data[:0])


def test_scores_within_classes_ask_the_denoiser_about_the_class(data, generator):
    """Each class is one mode, known to the denoiser: what is left is the distance within the mode."""
    one = GaussianMixture(torch.tensor([[2.0, 0, 0, 0]]), torch.tensor([0.3]), torch.ones(1)).denoiser(NOISE)

    def denoiser(x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        sign = (1 - 2 * class_labels)[:, None].to(x.dtype)
        return one(x * sign, t) * sign

    classes = (data[:, 0] < 0).long()
    scorer = MinorityScorer(denoiser, NOISE, level=0.05, draws=2)
    scores = score_dataset(scorer, data, class_labels=classes, batch_size=32)
    plain = score_dataset(MinorityScorer(LAW.denoiser(NOISE), NOISE, level=0.05, draws=2), data, batch_size=32)
    assert plain[classes == 1].mean() > 5 * plain[classes == 0].mean()
    assert scores[classes == 1].mean() < 2 * scores[classes == 0].mean()
    assert scorer.residuals(data[:4], generator(), classes[:4]).shape == (4, 4)


class TestDataSets:
    def test_an_interrupted_run_gives_the_same_scores(self, scorer, data, tmp_path):
        path = tmp_path / "scores.safetensors"
        whole = score_dataset(scorer, data, batch_size=7, seed=3)

        def stop(done: int) -> None:
            if done > 60:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            score_dataset(scorer, data, batch_size=7, seed=3, path=path, progress=stop)
        with pytest.raises(ValueError, match="run the same"):
            read_scores(path)
        seen: list[int] = []
        assert torch.equal(score_dataset(scorer, data, batch_size=7, seed=3, path=path, progress=seen.append), whole)
        assert seen[0] == 56  # eight batches had been saved
        assert torch.equal(read_scores(path)[0], whole)

    def test_another_run_is_refused(self, scorer, data, tmp_path):
        path = tmp_path / "scores.safetensors"
        score_dataset(scorer, data, path=path)
        before = path.read_bytes()
        with pytest.raises(ValueError, match="seed differ"):
            score_dataset(scorer, data, path=path, seed=1)
        assert path.read_bytes() == before

    def test_auto_level_is_refused(self, data):
        with pytest.raises(ValueError, match="calibrated"):
            score_dataset(MinorityScorer(LAW.denoiser(NOISE), NOISE), data)


class TestClassifier:
    @pytest.mark.parametrize(
        ("shape", "options"),
        [((4,), {}), ((3, 8, 8), {"network": "unet", "width": 8}), ((16, 4), {}), ((1, 8, 8), {"classes": 3, "parts": 2})],
    )
    def test_files_give_the_same_classifier(self, shape, options, tmp_path, generator):
        classifier = MinorityClassifier(shape, 5, seed=1, **options).eval()
        classifier.facts = {"top_variance": 3.5}
        loaded = MinorityClassifier.load(classifier.save(tmp_path / "c.safetensors"))
        x = torch.randn(6, *shape, generator=generator())
        labels = torch.arange(6) % 3 if classifier.classes else None
        assert torch.equal(loaded.log_prob(x, 0.6, 0.8, labels), classifier.log_prob(x, 0.6, 0.8, labels))
        assert loaded.facts == {"top_variance": 3.5}
        assert loaded.labels == 5 - 1 + classifier.parts
        assert not list(tmp_path.glob("*.part"))

    def test_one_classifier_for_every_frame(self, generator):
        """The same signal-to-noise ratio in another scaling is the same question."""
        classifier = MinorityClassifier((4,), 5).eval()
        x = torch.randn(6, 4, generator=generator())
        vp = classifier.log_prob(x, 0.6, 0.8)
        torch.testing.assert_close(classifier.log_prob(x / 0.6, 1.0, 0.8 / 0.6), vp, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(classifier.log_prob(x / 1.4, 0.6 / 1.4, 0.8 / 1.4), vp, rtol=1e-4, atol=1e-5)

    def test_initial_weights_follow_the_seed_alone(self):
        state = torch.get_rng_state()
        a, b, c = (MinorityClassifier((4,), 5, seed=s) for s in (1, 1, 2))
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(a.network.first.weight, b.network.first.weight)
        assert not torch.equal(a.network.first.weight, c.network.first.weight)

    def test_other_files_are_refused(self, tmp_path, scorer, data):
        with pytest.raises(FileNotFoundError, match="fewstep minority train"):
            MinorityClassifier.load(tmp_path / "none.safetensors")
        score_dataset(scorer, data, path=tmp_path / "scores.safetensors")
        with pytest.raises(ValueError, match="not a minority classifier"):
            MinorityClassifier.load(tmp_path / "scores.safetensors")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (((4,), 1), "bins"),
            (((0,), 5), "shape"),
            (((4,), 5, {"network": "unet"}), r"\(C, H, W\)"),
            (((4,), 5, {"network": "cnn"}), "known: auto, mlp, unet"),
            (((4,), 5, {"parts": 0}), "parts"),
        ],
    )
    def test_bad_arguments(self, arguments, message):
        shape, bins, *options = arguments
        with pytest.raises(ValueError, match=message):
            MinorityClassifier(shape, bins, **(options[0] if options else {}))

    def test_label_masks(self):
        classifier = MinorityClassifier((4,), 4, parts=3)
        assert label_mask(classifier, -1, 1).tolist() == [[False] * 3 + [True] * 3]
        assert label_mask(classifier, 1, 1).tolist() == [[False, True] + [False] * 4]
        assert label_mask(classifier, "each", 4).int().argmax(1).tolist() == [3, 4, 5, 3]
        assert label_mask(classifier, "part:2,0", 4).int().argmax(1).tolist() == [5, 3, 5, 3]
        assert label_mask(classifier, [0, 2], 4).int().argmax(1).tolist() == [0, 2, 0, 2]
        for wrong, message in ((4, "outside"), ("part:3", r"0\.\.2"), ("part:x", "each"), ([0, 1, 2], "do not fit")):
            with pytest.raises(ValueError, match=message):
                label_mask(classifier, wrong, 4)


class TestFit:
    @staticmethod
    def problem() -> tuple[Tensor, Tensor]:
        """Two far clusters: the label is which."""
        x = torch.randn(400, 4, generator=torch.Generator().manual_seed(0)) * 0.2
        labels = torch.arange(400) % 2
        x[:, 0] += 2.0 * labels - 1
        return x, labels

    @staticmethod
    def small(**options: int) -> MinorityClassifier:
        return MinorityClassifier((4,), 2, width=16, depth=1, **options)

    def test_learns_and_repeats(self):
        x, labels = self.problem()
        settings = FitSettings(steps=120, batch_size=64, check_every=40, lr=3e-3)
        seen: list[int] = []
        first, second = self.small(), self.small()
        report = first.fit(x, labels, NOISE, settings, progress=lambda step, loss: seen.append(step))
        fit(second, x, labels, NOISE, settings)
        assert seen == [40, 80, 120]
        assert report.validation_loss < 0.6 < 0.69  # ln 2 is knowing nothing; most times in [0, 1] are nearly pure noise
        assert not first.training
        assert torch.equal(first.network.first.weight, second.network.first.weight)
        clean = first.log_prob(x, 0.999, 0.045).argmax(1)
        assert (clean == labels).double().mean() > 0.98

    def test_an_interrupted_run_gives_the_same_weights(self, tmp_path: Path):
        x, labels = self.problem()
        settings = FitSettings(steps=90, batch_size=32, check_every=30)
        whole, resumed, path = self.small(), self.small(), tmp_path / "fit.checkpoint"
        fit(whole, x, labels, NOISE, settings)

        def stop(step: int, loss: float) -> None:
            if step == 30:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fit(self.small(), x, labels, NOISE, settings, checkpoint=path, progress=stop)
        fit(resumed, x, labels, NOISE, settings, checkpoint=path)
        assert torch.equal(whole.network.first.weight, resumed.network.first.weight)
        with pytest.raises(ValueError, match="lr differ"):
            fit(self.small(), x, labels, NOISE, FitSettings(steps=90, batch_size=32, check_every=30, lr=1.0), checkpoint=path)

    @pytest.mark.slow
    def test_early_stop_keeps_the_best_weights(self):
        """Labels without meaning: the held-out loss soon rises."""
        x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
        labels = torch.arange(60) % 2
        settings = FitSettings(steps=2000, batch_size=64, lr=1e-2, check_every=25, patience=3, validation=0.3)
        report = fit(MinorityClassifier((4,), 2, width=64, depth=2), x, labels, NOISE, settings)
        assert report.steps == report.best_step + 75 < 2000

    @pytest.mark.parametrize("noise", [NoiseSchedule.edm(), NoiseSchedule.flow(), NoiseSchedule.vp_cosine()])
    def test_every_family(self, noise):
        x, labels = self.problem()
        report = fit(self.small(), x, labels, noise, FitSettings(steps=60, batch_size=64, check_every=60, lr=5e-3))
        assert report.validation_loss < 0.68

    @pytest.mark.slow
    def test_class_conditional(self):
        """The meaning of the label is turned round in the second class."""
        x, labels = self.problem()
        classes = torch.arange(400) // 200
        turned = torch.where(classes == 1, 1 - labels, labels)
        classifier = self.small(classes=2)
        settings = FitSettings(steps=200, batch_size=64, check_every=200, lr=5e-3)
        fit(classifier, x, turned, NOISE, settings, class_labels=classes)
        right = classifier.log_prob(x, 0.999, 0.045, classes).argmax(1) == turned
        assert right.double().mean() > 0.95

    def test_bad_labels(self):
        x, labels = self.problem()
        with pytest.raises(ValueError, match=r"0\.\.1, found 0\.\.2"):
            fit(self.small(), x, labels + (labels == 1), NOISE)
        with pytest.raises(ValueError, match="need labels of shape"):
            fit(self.small(), x, labels[:5], NOISE)
        with pytest.raises(ValueError, match="go together"):
            fit(self.small(), x, labels, NOISE, class_labels=labels)
        with pytest.raises(ValueError, match="steps must be at least 1"):
            FitSettings(steps=0)

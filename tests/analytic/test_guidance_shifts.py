"""Guidance as a shift of the prediction, against laws where conditioning on a class is exact."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from samplers import NoiseSchedule, recipe, sample
from samplers.denoisers import GaussianMixture
from samplers.guidance import boost_gain, class_gradient, guided_denoiser, label_mask, level_of_gain, time_of_alpha_bar
from samplers.guidance.boosting import model_top_variance
from samplers.parametrization import PARAMETRIZATIONS, to_x0, x0_coefficients

SCHEDULES = {
    "vp": NoiseSchedule.vp_linear(),
    "cosine": NoiseSchedule.vp_cosine(),
    "edm": NoiseSchedule.edm(),
    "flow": NoiseSchedule.flow(),
}


@dataclass
class ExactClassifier:
    """The posterior over a mixture's components."""

    mixture: GaussianMixture
    parts: int = 1
    classes: int | None = None

    @property
    def bins(self) -> int:
        return len(self.mixture.weights) - self.parts + 1

    def log_prob(self, x: Tensor, alpha: float, sigma: float, class_labels: Tensor | None = None) -> Tensor:
        return self.mixture._posterior(x, alpha, sigma)[0].log_softmax(-1)


@pytest.fixture
def mixture() -> GaussianMixture:
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    return GaussianMixture(means, torch.tensor([0.3, 0.5, 0.2, 0.4]), torch.tensor([0.4, 0.3, 0.25, 0.05]))


def component(mixture: GaussianMixture, *which: int) -> GaussianMixture:
    index = torch.tensor(which)
    return GaussianMixture(mixture.means[index], mixture.variances[index, 0].sqrt(), mixture.weights[index])


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("fraction", [0.05, 0.4, 0.9])
def test_unit_scale_with_the_exact_classifier_is_the_conditional_denoiser(mixture, name, fraction, generator):
    noise = SCHEDULES[name]
    t = torch.tensor(fraction * noise.t_max, dtype=torch.float64)
    alpha, sigma = noise.alpha_sigma(t)
    x = alpha * mixture.sample(6, generator()) + sigma * torch.randn(6, 5, dtype=torch.float64, generator=generator(1))
    guided = guided_denoiser(mixture.denoiser(noise), noise, ExactClassifier(mixture), 1.0, -1)
    torch.testing.assert_close(guided(x, t), component(mixture, 3).denoiser(noise)(x, t), rtol=1e-9, atol=1e-9)


def test_the_rarest_bin_of_a_split_classifier_is_the_union_of_its_parts(mixture, generator):
    noise, t = SCHEDULES["vp"], torch.tensor(0.4, dtype=torch.float64)
    x = torch.randn(6, 5, dtype=torch.float64, generator=generator())
    classifier = ExactClassifier(mixture, parts=2)
    union = guided_denoiser(mixture.denoiser(noise), noise, classifier, 1.0, -1)
    torch.testing.assert_close(union(x, t), component(mixture, 2, 3).denoiser(noise)(x, t), rtol=1e-9, atol=1e-9)
    each = guided_denoiser(mixture.denoiser(noise), noise, classifier, 1.0, "each")(x, t)
    for part in (2, 3):
        expected = component(mixture, part).denoiser(noise)(x, t)
        torch.testing.assert_close(each[part - 2 :: 2], expected[part - 2 :: 2], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", PARAMETRIZATIONS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_output_shift_of_every_parametrization_is_the_score_shift(mixture, kind, name, generator):
    """output + (sigma^2/alpha) g / c_o is what a network of the conditional law would have returned."""
    noise = SCHEDULES[name]
    t = torch.tensor(0.3 * noise.t_max, dtype=torch.float64)
    alpha, sigma = (value.item() for value in noise.alpha_sigma(t))
    x = alpha * mixture.sample(6, generator()) + sigma * torch.randn(6, 5, dtype=torch.float64, generator=generator(1))
    c_x, c_o = x0_coefficients(kind, alpha, sigma)
    output = (mixture.denoiser(noise)(x, t) - c_x * x) / c_o
    classifier = ExactClassifier(mixture)
    gradient = class_gradient(classifier, x, alpha, sigma, label_mask(classifier, 3, 6))
    conditional = component(mixture, 3)
    difference = conditional.score(x, alpha, sigma) - mixture.score(x, alpha, sigma)
    torch.testing.assert_close(gradient, difference, rtol=1e-9, atol=1e-9)
    shifted = output + sigma**2 / alpha * gradient / c_o
    expected = conditional.denoiser(noise)(x, t)
    torch.testing.assert_close(to_x0(shifted, x, alpha, sigma, kind), expected, rtol=1e-8, atol=1e-8)
    known = {"epsilon": -sigma, "sample": sigma**2 / alpha, "v_prediction": -sigma * (alpha**2 + sigma**2) / alpha}
    if kind in known:
        assert sigma**2 / alpha / c_o == pytest.approx(known[kind])


def test_gradients_come_out_under_no_grad_and_inference_mode(mixture, generator):
    classifier = ExactClassifier(mixture)
    x = torch.randn(3, 5, dtype=torch.float64, generator=generator())
    plain = class_gradient(classifier, x, 0.6, 0.8, label_mask(classifier, -1, 3))
    with torch.no_grad():
        torch.testing.assert_close(class_gradient(classifier, x, 0.6, 0.8, label_mask(classifier, -1, 3)), plain)
    with torch.inference_mode():
        made_inside = x + 0.0
        torch.testing.assert_close(class_gradient(classifier, made_inside, 0.6, 0.8, label_mask(classifier, -1, 3)), plain)


def test_mean_form_shifts_an_ancestral_step_by_its_variance_times_the_gradient(mixture, generator):
    noise, classifier = SCHEDULES["vp"], ExactClassifier(mixture)
    schedule = recipe("ddpm", noise, 4)
    t, s = schedule.times[1:3]
    x = torch.randn(3, 5, dtype=torch.float64, generator=generator())
    one = recipe("ddpm", noise, 1)
    step = type(one)(times=(t, s), steps=one.steps)
    base = mixture.denoiser(noise)
    guided = guided_denoiser(base, noise, classifier, 2.0, form="mean", times=schedule.times)
    moved = sample(guided, x, step, noise, generator=generator(5)) - sample(base, x, step, noise, generator=generator(5))
    ratio = noise.alpha(t) * noise.sigma(s) / (noise.alpha(s) * noise.sigma(t))
    variance = noise.sigma(s) ** 2 * (1 - ratio**2)  # of q(x_s | x_t, x_0)
    gradient = class_gradient(classifier, x, noise.alpha(t).item(), noise.sigma(t).item(), label_mask(classifier, -1, 3))
    torch.testing.assert_close(moved, 2.0 * variance * gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("variance", "skipped", "steps"), [(1 / 15.8, 20, 100), (15.8, 30, 100), (200.0, 12, 100), (15.8, 36, 120)]
)
def test_boost_gain_of_a_gaussian(variance, skipped, steps, generator):
    """The output variance of ancestral sampling from boosted noise, 10000 samples (standard error 1.4%)."""
    noise, gamma = SCHEDULES["vp"], 4.0
    law = GaussianMixture(torch.zeros(1, 1), torch.tensor([variance**0.5]))
    schedule = recipe("ddpm", noise, steps).tail(skipped)
    level = noise.alpha(schedule.times[0]).item() ** 2
    gains = {}
    for start in (1.0, gamma):
        x = start * torch.randn(10_000, 1, dtype=torch.float64, generator=generator())
        out = sample(law.denoiser(noise), x, schedule, noise, generator=generator(1))
        gains[start] = out.var().item()
    predicted = {start: boost_gain(level, variance, start) for start in gains}
    assert gains[gamma] / gains[1.0] == pytest.approx(predicted[gamma] / predicted[1.0], rel=0.1)


def test_level_of_gain_inverts_the_gain_and_names_the_highest():
    level = level_of_gain(2.5, 15.0, 4.0)
    assert boost_gain(level, 15.0, 4.0) == pytest.approx(2.5, rel=2e-3)
    assert boost_gain(level * 0.9, 15.0, 4.0) < 2.5
    with pytest.raises(ValueError, match="the highest is"):
        level_of_gain(50.0, 1.0, 1.5)
    with pytest.raises(ValueError, match="gamma must be above 1"):
        level_of_gain(2.0, 1.0, 1.0)


def test_too_much_skipping_narrows_what_it_should_widen():
    """Beyond v = gamma^2 the gain falls below 1: 40% of 100 linear steps, variance 200, gamma 2."""
    level = SCHEDULES["vp"].alpha(0.6).item() ** 2
    assert boost_gain(level, 200.0, 2.0) == pytest.approx(0.71, abs=0.03)


def test_top_variance_is_read_from_the_denoiser():
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    law = GaussianMixture(torch.zeros(1, 6), covariances=(factor @ factor.mT)[None])
    noise = SCHEDULES["vp"]
    found = model_top_variance(law.denoiser(noise), noise, (6,), generator=generator, dtype=torch.float64)
    assert found == pytest.approx(torch.linalg.eigvalsh(law.covariance)[-1].item(), rel=1e-3)


@pytest.mark.parametrize("name", SCHEDULES)
def test_time_of_alpha_bar(name):
    noise = SCHEDULES[name]
    alpha, sigma = noise.alpha_sigma(time_of_alpha_bar(noise, 0.024))
    assert (alpha**2 / (alpha**2 + sigma**2)).item() == pytest.approx(0.024)
    with pytest.raises(ValueError, match=r"in \(0, 1\)"):
        time_of_alpha_bar(noise, 1.0)


def test_levels_beyond_the_noise_schedule_are_refused():
    with pytest.raises(ValueError, match="noisiest level"):
        time_of_alpha_bar(NoiseSchedule.vp_discrete(torch.linspace(0.99, 0.5, 10)), 0.024)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": -1.0}, "scale"),
        ({"scale": float("nan")}, "scale"),
        ({"label": 4}, "outside"),
        ({"label": -5}, "outside"),
        ({"label": "all"}, "each"),
        ({"label": "each"}, "parts"),
        ({"window": (0.5, 0.2)}, "window"),
        ({"form": "score"}, "form"),
        ({"form": "mean"}, "times"),
    ],
)
def test_bad_guidance_is_refused_before_any_evaluation(mixture, arguments, message):
    def never(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("evaluated")

    with pytest.raises(ValueError, match=message):
        guided_denoiser(never, SCHEDULES["vp"], ExactClassifier(mixture), **arguments)

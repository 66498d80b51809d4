"""Exact denoisers against autograd, brute force, limits and each other."""

import math

import pytest
import torch
from torch import Tensor

from samplers import NoiseSchedule
from samplers.denoisers import EmpiricalDataset, GaussianMixture

VP, EDM, FLOW = NoiseSchedule.vp_linear(), NoiseSchedule.edm(), NoiseSchedule.flow()
MEANS = torch.tensor([[1.0, -0.5, 0.2], [-1.5, 0.3, 0.0], [0.2, 2.0, -1.0]], dtype=torch.float64)
STDS = torch.tensor([0.3, 0.8, 0.1], dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
ROOTS = torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
LAWS = {
    "isotropic": GaussianMixture(MEANS, STDS, WEIGHTS),
    "full": GaussianMixture(MEANS, weights=WEIGHTS, covariances=ROOTS @ ROOTS.mT),
    "singular": GaussianMixture(MEANS, weights=WEIGHTS, covariances=ROOTS[..., :1] @ ROOTS[..., :1].mT),
    "one": GaussianMixture(MEANS[:1], STDS[:1]),
}
ALL = pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
LEVELS = pytest.mark.parametrize("noise", [VP, EDM, FLOW], ids=lambda noise: noise.kind)


@pytest.fixture
def x(generator) -> Tensor:
    return 1.5 * torch.randn(6, 3, generator=generator(2), dtype=torch.float64)


@ALL
@LEVELS
def test_score_is_the_gradient_of_the_log_density(law: GaussianMixture, noise: NoiseSchedule, x: Tensor) -> None:
    alpha, sigma = noise.alpha_sigma(0.4)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(law.log_prob(leaf, alpha, sigma).sum(), leaf)
    torch.testing.assert_close(law.score(x, alpha, sigma), gradient, rtol=1e-9, atol=1e-10)


@ALL
@LEVELS
@pytest.mark.parametrize("t", [0.01, 0.4, 0.99])
def test_denoiser_obeys_tweedie(law: GaussianMixture, noise: NoiseSchedule, t: float, x: Tensor) -> None:
    alpha, sigma = noise.alpha_sigma(t)
    x0 = law.denoiser(noise)(x, torch.tensor(t, dtype=torch.float64))
    torch.testing.assert_close(x0, (x + sigma**2 * law.score(x, alpha, sigma)) / alpha, rtol=1e-8, atol=1e-9)


def test_log_density_is_the_sum_of_gaussians(x: Tensor) -> None:
    alpha, sigma = 0.7, 0.5
    total = torch.zeros(6, dtype=torch.float64)
    for mean, std, weight in zip(MEANS, STDS, WEIGHTS, strict=True):
        variance = (alpha * std) ** 2 + sigma**2
        total += weight * torch.exp(-((x - alpha * mean) ** 2).sum(-1) / (2 * variance)) / (2 * math.pi * variance) ** 1.5
    torch.testing.assert_close(LAWS["isotropic"].log_prob(x, alpha, sigma), total.log(), rtol=1e-10, atol=1e-10)


def test_isotropic_is_a_special_full_covariance(x: Tensor) -> None:
    covariances = STDS[:, None, None] ** 2 * torch.eye(3, dtype=torch.float64)
    other, law = GaussianMixture(MEANS, weights=WEIGHTS, covariances=covariances), LAWS["isotropic"]
    t = torch.tensor(0.3, dtype=torch.float64)
    torch.testing.assert_close(other.denoiser(VP)(x, t), law.denoiser(VP)(x, t), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(other.log_prob(x), law.log_prob(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(other.covariance, law.covariance, rtol=1e-12, atol=1e-12)


def test_full_covariance_against_conditioning(x: Tensor) -> None:
    """One Gaussian: E[x0 | x] = m + alpha S (alpha^2 S + sigma^2 I)^-1 (x - alpha m)."""
    covariance = ROOTS[0] @ ROOTS[0].mT
    law = GaussianMixture(MEANS[:1], covariances=covariance[None])
    t = torch.tensor(0.3, dtype=torch.float64)
    alpha, sigma = VP.alpha_sigma(t)
    gain = alpha * covariance @ torch.linalg.inv(alpha**2 * covariance + sigma**2 * torch.eye(3, dtype=torch.float64))
    expected = MEANS[0] + (x - alpha * MEANS[0]) @ gain.mT
    torch.testing.assert_close(law.denoiser(VP)(x, t), expected, rtol=1e-11, atol=1e-11)


@ALL
def test_samples_have_the_moments(law: GaussianMixture, generator) -> None:
    n = 40_000
    draws = law.sample(n, generator(7))
    assert draws.dtype == torch.float64
    error = 5 * (law.covariance.diagonal() / n).sqrt()
    assert bool(((draws.mean(0) - law.mean).abs() < error).all())
    torch.testing.assert_close(draws.mT.cov(), law.covariance, rtol=0.05, atol=0.05)


def test_moments_by_hand() -> None:
    law = GaussianMixture(torch.tensor([[0.0], [4.0]]), torch.tensor([1.0, 2.0]), torch.tensor([3.0, 1.0]))
    assert law.mean.item() == pytest.approx(1.0)
    assert law.covariance.item() == pytest.approx(0.75 * 1 + 0.25 * 4 + 0.75 * 1 + 0.25 * 9)


@ALL
@LEVELS
def test_denoiser_at_the_ends(law: GaussianMixture, noise: NoiseSchedule, x: Tensor) -> None:
    """At alpha = 0 the state says nothing and the answer is the mean; shapes and dtypes are the state's."""
    t = torch.tensor(noise.t_max, dtype=torch.float64)
    state = (x * noise.sigma(t)).float().reshape(6, 1, 3)
    x0 = law.denoiser(noise)(state, t)
    assert x0.shape == state.shape
    assert x0.dtype == torch.float32
    assert bool(x0.isfinite().all())
    if noise is FLOW:
        torch.testing.assert_close(x0.double().reshape(6, 3), law.mean.expand(6, 3), rtol=1e-6, atol=1e-6)


DATA = torch.randn(37, 2, 3, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


@LEVELS
@pytest.mark.parametrize("t", [0.02, 0.3, 0.95])
def test_empirical_denoiser_is_the_mixture_of_its_points(noise: NoiseSchedule, t: float, generator) -> None:
    time = torch.tensor(t, dtype=torch.float64)
    alpha, sigma = noise.alpha_sigma(time)
    x = alpha * DATA[:5] + sigma * torch.randn(5, 2, 3, generator=generator(1), dtype=torch.float64)
    mixture = GaussianMixture(DATA.reshape(37, 6), torch.zeros(37))
    x0 = EmpiricalDataset(DATA).denoiser(noise)(x, time)
    torch.testing.assert_close(x0, mixture.denoiser(noise)(x, time), rtol=1e-8, atol=1e-8)
    distance = (x[:, None] - alpha * DATA).square().sum((-1, -2)) / (2 * sigma**2)
    brute = torch.einsum("bn,nij->bij", (-distance).softmax(-1), DATA)
    torch.testing.assert_close(x0, brute, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("chunk", [1, 5, 36, 37, 1000])
def test_empirical_denoiser_does_not_depend_on_its_chunks(chunk: int) -> None:
    x, t = DATA[:4] + 0.3, torch.tensor(0.5, dtype=torch.float64)
    whole = EmpiricalDataset(DATA).denoiser(VP)(x, t)
    torch.testing.assert_close(EmpiricalDataset(DATA, chunk=chunk).denoiser(VP)(x, t), whole, rtol=1e-12, atol=1e-12)


def test_empirical_denoiser_at_little_noise_is_the_nearest_point() -> None:
    t = torch.tensor(0.002, dtype=torch.float64)
    x = DATA[:5] + 0.002
    torch.testing.assert_close(EmpiricalDataset(DATA).denoiser(EDM)(x, t), DATA[:5], rtol=1e-12, atol=1e-12)
    low = EmpiricalDataset(DATA.float()).denoiser(EDM)(x.float(), t)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, DATA[:5].float())


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: GaussianMixture(MEANS[0], STDS), r"means must have shape \(K, D\), got \(3,\)"),
        (lambda: GaussianMixture(MEANS), "either stds"),
        (lambda: GaussianMixture(MEANS, STDS, covariances=ROOTS), "either stds"),
        (lambda: GaussianMixture(MEANS, STDS[:2]), "stds must be 3 numbers"),
        (lambda: GaussianMixture(MEANS, -STDS), "stds must be 3 numbers >= 0"),
        (lambda: GaussianMixture(MEANS, STDS, torch.tensor([1.0, 0.0, 1.0])), "weights must be 3 positive"),
        (lambda: GaussianMixture(MEANS, covariances=ROOTS[:2]), "covariances must have shape"),
        (lambda: GaussianMixture(MEANS, covariances=-torch.eye(3).expand(3, 3, 3)), "positive semi-definite"),
        (lambda: EmpiricalDataset(torch.zeros(0, 2)), "N >= 1"),
        (lambda: EmpiricalDataset(torch.zeros(3)), r"\(N, \*E\)"),
        (lambda: EmpiricalDataset(torch.zeros(3, 2, dtype=torch.int64)), "floating-point"),
        (lambda: LAWS["one"].log_prob(torch.zeros(2, 5)), "5 values per sample, the mixture 3"),
    ],
)
def test_bad_laws_are_refused(build, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        build()

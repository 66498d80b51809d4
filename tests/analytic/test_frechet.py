"""Frechet distances and moments: closed forms, rank deficiency, streaming and merging."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from samplers.evaluation import FeatureMoments, FrechetReference, frechet_distance, gaussian_wasserstein


def covariance(dim: int, seed: int, rank: int | None = None) -> torch.Tensor:
    a = torch.randn(dim, rank or 2 * dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return a @ a.mT / a.shape[1]


def test_commuting_covariances():
    mu1, mu2 = torch.tensor([1.0, 2.0, -1.0]), torch.tensor([0.0, 2.0, 1.0])
    a, b = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([4.0, 4.0, 0.0])
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    sigma1, sigma2 = (rotation @ torch.diag(v.double()) @ rotation.mT for v in (a, b))
    expected = 5.0 + (a.sqrt() - b.sqrt()).square().sum().item()
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-12)
    assert gaussian_wasserstein(mu1, sigma1, mu2, sigma2) == pytest.approx(math.sqrt(expected), rel=1e-12)


def test_against_sqrtm_and_symmetric():
    s1, s2 = covariance(20, 1), covariance(20, 2)
    mu = torch.zeros(20)
    expected = (s1.trace() + s2.trace() - 2 * np.trace(sqrtm((s1 @ s2).numpy()).real)).item()
    assert frechet_distance(mu, s1, mu, s2) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(mu, s1, mu, s2) == pytest.approx(frechet_distance(mu, s2, mu, s1), rel=1e-10)
    assert frechet_distance(mu, s1, mu, s1) < 1e-12


def test_numpy_input():
    assert frechet_distance(np.zeros(2), np.eye(2), np.ones(2), np.eye(2)) == pytest.approx(2.0)


@pytest.mark.parametrize("rank", [1, 5])
def test_singular_covariances(rank):
    """Fewer images than features: what makes sqrtm return imaginary numbers of any size."""
    mu = torch.zeros(30)
    singular, full = covariance(30, 3, rank), covariance(30, 4)
    near = frechet_distance(mu, singular + 1e-12 * torch.eye(30), mu, full)
    assert frechet_distance(mu, singular, mu, full) == pytest.approx(near, rel=1e-4)
    assert frechet_distance(mu, singular, mu, full) == pytest.approx(frechet_distance(mu, full, mu, singular), rel=1e-6)
    assert frechet_distance(mu, singular, mu, singular) < 1e-6
    assert frechet_distance(mu, torch.zeros(30, 30), mu, full) == pytest.approx(full.trace().item())


@pytest.mark.parametrize("n", [2, 12, 40, 200])
def test_features_give_what_moments_give(n):
    reference = FrechetReference(torch.zeros(40), covariance(40, 5))
    features = torch.randn(n, 40, generator=torch.Generator().manual_seed(6)) + 1
    moments = FeatureMoments(40)
    moments.update(features)
    assert reference.distance_to_features(features) == pytest.approx(reference.distance_to_moments(moments), rel=1e-6)


def test_unit_variance_is_scale_free():
    x = torch.randn(500, 8, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    y = 1.3 * torch.randn(400, 8, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    values = [FrechetReference.from_features(s * x, unit_variance=True).distance_to_features(s * y) for s in (1e-3, 1.0, 50.0)]
    assert values == pytest.approx([values[0]] * 3, rel=1e-9)
    plain = FrechetReference.from_features(x)
    assert plain.distance_to_features(y) == pytest.approx(values[0] * plain.sigma.trace().item(), rel=1e-9)


@pytest.mark.parametrize(
    ("mu", "sigma", "message"),
    [
        (torch.zeros(3), torch.eye(2), r"\(D,\) and \(D, D\)"),
        (torch.zeros(2), torch.tensor([[1.0, 0.9], [0.0, 1.0]]), "not symmetric"),
        (torch.zeros(2), torch.diag(torch.tensor([1.0, -0.5])), "not a covariance"),
        (torch.tensor([0.0, torch.nan]), torch.eye(2), "not finite"),
        (torch.zeros(3), torch.eye(3), "2 features"),
    ],
)
def test_refuses(mu, sigma, message):
    with pytest.raises(ValueError, match=message):
        FrechetReference(torch.zeros(2), torch.eye(2)).distance(mu, sigma)


def test_covariances_that_were_summed_in_single_precision():
    """Files of other tools: singular, and with eigenvalues below zero by float32 rounding; clipped, not refused."""
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(9))
    single, exact = torch.cov(x.T), torch.cov(x.double().T)
    assert torch.linalg.eigvalsh(single.double()).min() < 0
    mu, other = torch.zeros(64), covariance(64, 10)
    expected = frechet_distance(mu, exact, mu, other)
    assert frechet_distance(mu, single, mu, other) == pytest.approx(expected, rel=1e-3)
    assert frechet_distance(mu, other, mu, single) == pytest.approx(expected, rel=1e-3)


def test_moments_are_those_of_numpy():
    x = torch.randn(1000, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e6
    moments = FeatureMoments(7, rows=64)
    for part in x.split([1, 63, 64, 200, 672]):
        moments.update(part)
    assert moments.n == 1000
    torch.testing.assert_close(moments.mean, x.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(moments.cov, torch.from_numpy(np.cov(x.numpy().T)), rtol=1e-8, atol=1e-9)


def test_more_features_than_a_block():
    """Large covariances are summed block by block, their lower triangles only."""
    x = torch.randn(700, 530, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    moments = FeatureMoments(530, rows=300)
    for part in x.split(90):
        moments.update(part)
    torch.testing.assert_close(moments.cov, torch.cov(x.T), rtol=1e-10, atol=1e-12)
    other = covariance(530, 12)
    mu = torch.zeros(530)
    root = torch.linalg.cholesky(other)
    expected = torch.linalg.eigvalsh(root.mT @ torch.cov(x.T) @ root).sqrt().sum()
    value = frechet_distance(mu, other, mu, torch.cov(x.T))
    assert value == pytest.approx((other.trace() + torch.cov(x.T).trace() - 2 * expected).item(), rel=1e-9)


def test_merge_order_changes_nothing():
    x = torch.randn(300, 5, generator=torch.Generator().manual_seed(1)) * 3 + 2
    whole = FeatureMoments(5)
    whole.update(x)
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        merged = FeatureMoments(5)
        for index in order:
            part = FeatureMoments(5, rows=16)
            part.update(x.split([1, 100, 199])[index])
            merged.merge(part)
        torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-13, atol=0)
        torch.testing.assert_close(merged.cov, whole.cov, rtol=1e-12, atol=1e-13)
        assert merged.n == 300


def test_moments_file(tmp_path):
    moments = FeatureMoments(4)
    moments.update(torch.randn(50, 4, generator=torch.Generator().manual_seed(2)))
    moments.save(tmp_path / "m.npz")
    back = FeatureMoments.load(tmp_path / "m.npz")
    assert back.n == 50
    torch.testing.assert_close(back.mean, moments.mean, rtol=0, atol=0)
    torch.testing.assert_close(back.cov, moments.cov, rtol=1e-15, atol=0)
    assert [p.name for p in tmp_path.iterdir()] == ["m.npz"]
    np.savez(tmp_path / "foreign.npz", mu=moments.mean.numpy(), sigma=moments.cov.numpy())
    foreign = FeatureMoments.load(tmp_path / "foreign.npz")
    assert foreign.n is None
    with pytest.raises(ValueError, match="without n"):
        back.merge(foreign)
    np.savez(tmp_path / "wrong.npz", mean=np.zeros(2))
    with pytest.raises(ValueError, match="no mu and no sigma"):
        FeatureMoments.load(tmp_path / "wrong.npz")


def test_moments_refuse():
    moments = FeatureMoments(3)
    with pytest.raises(ValueError, match=r"\(B, 3\)"):
        moments.update(torch.zeros(2, 4))
    moments.update(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="at least 2"):
        _ = moments.cov
    moments.update(torch.tensor([[torch.inf, 0, 0]]))
    with pytest.raises(ValueError, match="not finite"):
        _ = moments.mean

"""Rarity measures by hand and by brute force."""

import math

import pytest
import torch

from samplers.evaluation import (
    average_knn_distance,
    frechet_distance,
    local_outlier_factor,
    precision_recall,
    rare_subset,
    rare_subset_report,
    rarity_scores,
    score_histograms,
)


@pytest.fixture
def clouds(generator):
    """A dense cloud of 180 and a thin one of 20, five wide, ten away."""
    dense = torch.randn(180, 3, generator=generator(), dtype=torch.float64)
    thin = 10 + 5 * torch.randn(20, 3, generator=generator(1), dtype=torch.float64)
    return dense, thin


def test_average_knn_distance_by_brute_force(clouds, generator):
    real = torch.cat(clouds)
    fake = torch.randn(7, 3, generator=generator(2), dtype=torch.float64)
    expected = torch.cdist(fake, real).topk(4, largest=False).values.mean(1)
    torch.testing.assert_close(average_knn_distance(fake, real, k=4), expected)


def test_rarity_score_is_the_smallest_ball_that_holds_the_sample():
    real = torch.tensor([[0.0], [1.0], [3.0], [10.0]])
    # radii to the nearest other: 1, 1, 2, 7
    fake = torch.tensor([[0.4], [2.2], [5.0], [16.9], [17.1]])
    found = rarity_scores(fake, real, k=1)
    assert found.scores[:4].tolist() == [1.0, 2.0, 2.0, 7.0]
    assert math.isnan(found.scores[4])
    assert found.off_manifold == pytest.approx(0.2)
    assert found.mean == pytest.approx(3.0)


def test_rarity_score_agrees_with_precision(clouds, generator):
    """Both use the same balls, so the share on the manifold is the precision."""
    real = torch.cat(clouds)
    fake = 3 * torch.randn(60, 3, generator=generator(3), dtype=torch.float64)
    found = rarity_scores(fake, real, k=3, block=17)
    assert 1 - found.off_manifold == pytest.approx(precision_recall(fake, real, k=3).precision)


def test_outlier_factor_is_near_one_inside_and_large_outside(clouds, generator):
    dense, _ = clouds
    inside = torch.randn(40, 3, generator=generator(4), dtype=torch.float64)
    assert local_outlier_factor(inside, dense).median().item() == pytest.approx(1.0, abs=0.15)
    assert local_outlier_factor(inside + 30, dense).min().item() > 5


def test_rare_subset_is_the_thin_cloud(clouds):
    rows = rare_subset(torch.cat(clouds), share=0.1)
    assert len(rows) == 20
    assert (rows >= 180).double().mean() >= 0.9


def test_report_against_the_rare_subset_tells_dense_from_thin(clouds, generator):
    dense, thin = clouds
    real, rare = torch.cat(clouds), torch.arange(180, 200)
    more = 10 + 5 * torch.randn(50, 3, generator=generator(5), dtype=torch.float64)
    close, far = rare_subset_report(more, real, rare), rare_subset_report(dense, real, rare)
    assert close.frechet < far.frechet
    assert close.precision > 0.9
    assert close.recall > 0.6 > 0.2 > far.recall
    expected = frechet_distance(more.mean(0), more.mT.cov(), thin.mean(0), thin.mT.cov())
    assert close.frechet == pytest.approx(expected)
    assert close.rare == 20


def test_histograms_share_their_bins():
    found = score_histograms({"a": torch.tensor([0.0, 1.0, 1.0, 4.0]), "b": torch.tensor([2.0, 2.0])}, bins=4)
    assert found.edges.tolist() == [0, 1, 2, 3, 4]
    assert found.shares["a"].tolist() == [0.25, 0.5, 0, 0.25]
    assert found.shares["b"].tolist() == [0, 0, 1, 0]
    with pytest.raises(ValueError, match="finite"):
        score_histograms({"a": torch.tensor([float("nan")])})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: average_knn_distance(x, x, k=5), "k must lie"),
        (lambda x: average_knn_distance(x[:, :2], x), "2 values"),
        (lambda x: rarity_scores(x / 0, x), "finite"),
        (lambda x: rare_subset(x, share=1.5), "share"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.eye(5, 3))

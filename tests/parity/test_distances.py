"""Distances on the same features as torchmetrics, torch-fidelity and pytorch-fid compute them."""

import warnings

import numpy as np
import pytest
import torch

from samplers.evaluation import FrechetReference, kernel_distance_subsets


@pytest.fixture(scope="module")
def sides():
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(24, 24, generator=g) * torch.linspace(0.1, 2, 24)
    return torch.randn(400, 24, generator=g) @ mix, 1.1 * torch.randn(300, 24, generator=g) @ mix + 0.2


def test_frechet(sides):
    value = FrechetReference.from_features(sides[0]).distance_to_features(sides[1])
    statistics = [{"mu": x.double().mean(0).numpy(), "sigma": np.cov(x.double().numpy().T)} for x in sides]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pytorch_fid.fid_score import calculate_frechet_distance
        from torch_fidelity.metric_fid import fid_statistics_to_metric
        from torchmetrics.image.fid import FrechetInceptionDistance

        pytorch_fid = calculate_frechet_distance(*statistics[0].values(), *statistics[1].values())
    fidelity = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    identity = torch.nn.Identity()
    identity.num_features = 24
    metric = FrechetInceptionDistance(feature=identity)
    metric.update(sides[0], real=True)
    metric.update(sides[1], real=False)
    assert [pytorch_fid, fidelity] == pytest.approx([value, value], rel=1e-9)
    assert metric.compute().item() == pytest.approx(value, rel=1e-5)  # its result is float32


def test_kernel(sides):
    """All vectors in every subset leave no randomness, so two implementations of KID must agree."""
    x, y = sides[0][:300].double(), sides[1].double()
    mean, std = kernel_distance_subsets(y, x, subsets=3, subset_size=300, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch_fidelity.metric_kid import kid_features_to_metric
    theirs = kid_features_to_metric(y, x, kid_subsets=3, kid_subset_size=300, verbose=False)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-8)
    assert std == pytest.approx(0, abs=1e-9)

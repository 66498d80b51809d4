"""Features of the model's own network, and whitening."""

import pytest
import torch
from torchvision.models import squeezenet1_1

from samplers import NoiseSchedule
from samplers.denoisers import from_network
from samplers.guidance import MinorityClassifier, MinorityScorer, NetworkFeatures, Whitening, feature_distance, lpips
from samplers.reference import digit_images, load


@pytest.fixture(scope="module")
def digits():
    pipe = load("digits")
    noise = NoiseSchedule.from_config(pipe.scheduler.config)
    return pipe.unet, from_network(pipe.unet, noise), noise


def test_whitened_vectors_are_centred_and_of_unit_covariance(generator):
    mix = torch.randn(5, 5, generator=generator())
    vectors = torch.randn(400, 5, generator=generator()) @ mix + 3
    white = Whitening.fit(vectors, shrink=1e-9)(vectors)
    torch.testing.assert_close(white.T.cov(), torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-5)
    assert white.mean(0).abs().max() < 1e-9
    centred = vectors.double() - vectors.double().mean(0)
    mahalanobis = (centred @ torch.linalg.inv(centred.T.cov()) * centred).sum(1)
    torch.testing.assert_close(white.square().sum(1), mahalanobis, rtol=1e-5, atol=1e-5)


def test_whitening_refuses_what_it_cannot_use():
    with pytest.raises(ValueError, match="at least two"):
        Whitening.fit(torch.ones(1, 3))
    with pytest.raises(ValueError, match="alike"):
        Whitening.fit(torch.ones(4, 3))
    with pytest.raises(ValueError, match="of 3 values, got 2"):
        Whitening.fit(torch.eye(3))(torch.ones(1, 2))


def test_features_come_from_every_block_and_leave_no_hook(digits):
    network, denoiser, noise = digits
    x = digit_images("test")[0][:3]
    seen = NetworkFeatures(network, denoiser, noise)
    assert "mid_block" in seen.blocks
    features = seen(torch.cat([x, x[:1]]))
    torch.testing.assert_close(features[0], features[3])  # the same noise for every image
    assert not torch.allclose(features[0], features[1])
    assert not any(module._forward_hooks for module in network.modules())
    finer = NetworkFeatures(network, denoiser, noise, places=2)(x)
    assert finer.shape == (3, 4 * features.shape[1])
    with pytest.raises(ValueError, match="no down_blocks"):
        NetworkFeatures(torch.nn.Linear(2, 2), denoiser, noise)
    with pytest.raises(ValueError, match="alpha_bar"):
        NetworkFeatures(network, denoiser, noise, level=2.0)


def test_a_whitened_scorer_gives_mahalanobis_distance_of_what_is_lost(digits, generator):
    network, denoiser, noise = digits
    x = digit_images("test")[0][:40]
    seen = NetworkFeatures(network, denoiser, noise)
    scorer = MinorityScorer(denoiser, noise, 0.1, draws=2, distance=feature_distance(seen), clip=1.0)
    lost = scorer.residuals(x, generator())
    whitened = scorer.whitened(Whitening.fit(lost))
    scores = whitened(x, generator())
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), Whitening.fit(lost)(lost).square().sum(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whitened.residuals(x, generator()).square().sum(1), scores)
    assert whitened.settings["whitened"] is True
    assert "whitened" not in scorer.settings


def test_tensors_travel_with_a_classifier(tmp_path):
    classifier = MinorityClassifier((3,), 2, width=4, depth=1)
    classifier.tensors = {"whitening.mean": torch.arange(3.0, dtype=torch.float64)}
    loaded = MinorityClassifier.load(classifier.save(tmp_path / "c.safetensors"))
    assert torch.equal(loaded.tensors["whitening.mean"], classifier.tensors["whitening.mean"])
    assert all(torch.equal(a, b) for a, b in zip(classifier.state_dict().values(), loaded.state_dict().values(), strict=True))


def test_lpips_where_its_weights_are(tmp_path, monkeypatch, generator):
    """Random backbone weights under the right name: it runs, is zero for equal images, and wants images it can see."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.save(squeezenet1_1(weights=None).state_dict(), tmp_path / "checkpoints" / "squeezenet1_1-b8a52dc0.pth")
    distance = lpips("squeeze")
    x = torch.rand(2, 3, 32, 32, generator=generator()) * 2 - 1
    assert distance(x, x).tolist() == [0.0, 0.0]
    assert distance(x.half(), -x.half()).min() > 0
    assert distance(x, -x).dtype == torch.float32
    with pytest.raises(ValueError, match="at least 32"):
        distance(x[..., :16, :16], x[..., :16, :16])

"""The features that ship: frozen, the same in every batch, and ordered as they should be on digits."""

import pytest
import torch

from samplers.evaluation import EXTRACTORS, FrechetReference, load_extractor, quantise
from samplers.reference import digit_images


@pytest.fixture(scope="module")
def digits():
    images = (digit_images("all")[0] + 1) / 2
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    return images[:898], images[898:1796]


def distance(name, reference, images):
    extractor = load_extractor(name)
    side = FrechetReference.from_features(extractor(quantise(reference)), unit_variance=True)
    return side.distance_to_features(extractor(quantise(images)))


@pytest.mark.parametrize("name", ["fd-randconv64-v1", "fd-pixel"])
def test_more_noise_is_further(name, digits):
    reference, held_out = digits
    noise = torch.randn(held_out.shape, generator=torch.Generator().manual_seed(1))
    values = [distance(name, reference, held_out + s * noise) for s in (0, 0.05, 0.1, 0.2, 0.4)]
    assert values == sorted(values)
    assert values[-1] > 10 * values[0]


def test_random_features_see_more_than_two_moments(digits):
    """Gaussian images with the digits' mean and covariance: near the floor for pixels, far above for random features."""
    reference, held_out = digits
    flat = reference.flatten(1).double()
    values, vectors = torch.linalg.eigh(flat.T.cov())
    root = vectors * values.clamp(min=0).sqrt()
    z = torch.randn(898, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gaussian = (flat.mean(0) + z @ root.T).reshape(-1, 1, 8, 8).float()
    ratios = [
        distance(name, reference, gaussian) / distance(name, reference, held_out) for name in ("fd-randconv64-v1", "fd-pixel")
    ]
    assert ratios[0] > 2 * ratios[1]


@pytest.mark.parametrize("name", ["fd-randconv64-v1", "fd-pixel"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 96, 64)])
def test_batch_does_not_matter(name, shape):
    images = torch.randint(0, 256, (5, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    extractor = load_extractor(name)
    together = extractor(images)
    apart = torch.cat([extractor(image[None]) for image in images])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


def test_frozen_values():
    """The random-convolution features of one fixed image must never change under the same name."""
    image = (torch.arange(3 * 16 * 16) % 251).to(torch.uint8).reshape(1, 3, 16, 16)
    features = load_extractor("fd-randconv64-v1")(image)[0]
    assert features.shape == (64,)
    expected = torch.tensor(FROZEN)
    torch.testing.assert_close(features[[0, 1, 31, 32, 63]], expected, rtol=1e-4, atol=1e-5)


FROZEN = [0.57887, 0.04308, 0.90748, 0.73176, 1.08277]


def test_names_say_what_they_are():
    for name in ("fd-randconv64-v1", "fd-pixel"):
        protocol = load_extractor(name).protocol
        assert protocol.id.startswith(f"{name}:")
        assert "not FID" in protocol.title
    with pytest.raises(ValueError, match=", ".join(EXTRACTORS[:2])):
        load_extractor("fid")


def test_pixels_are_not_guessed():
    with pytest.raises(ValueError, match="quantise"):
        load_extractor("fd-pixel")(torch.rand(2, 3, 8, 8))
    with pytest.raises(ValueError, match="1 or 3"):
        load_extractor("fd-pixel")(torch.zeros(2, 4, 8, 8, dtype=torch.uint8))
    assert quantise(torch.tensor([0.999, 0.5, -0.2, 1.7])).tolist() == [255, 128, 0, 255]
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        quantise(torch.zeros(3, dtype=torch.uint8))

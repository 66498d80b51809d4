"""From pixels to the distance, against torch-fidelity, pytorch-fid and clean-fid, with one file of random weights.

The published weights need a download, so all tools get the same randomly initialised file.
"""

import itertools
import warnings

import numpy as np
import pytest
import torch

from samplers.evaluation import FrechetReference, MissingModelError, load_extractor
from samplers.evaluation.features.inception import FidInception

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file as the published ones: the graph with a classifier of 1008 classes; spread so that features vary."""
    torch.manual_seed(0)
    with torch.no_grad():
        network = FidInception()
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.8, 1.2)
                module.bias.normal_(0, 0.1)
            elif isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    state = {**network.state_dict(), "fc.weight": torch.randn(1008, 2048) / 45, "fc.bias": torch.zeros(1008)}
    path = tmp_path_factory.mktemp("weights") / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def images():
    """Two sets of 6 colour images of 40x32: smooth noise, the second brighter and rougher."""

    def noise(seed, sharpness, brightness):
        g = torch.Generator().manual_seed(seed)
        small = torch.rand(6, 3, sharpness, sharpness, generator=g)
        big = torch.nn.functional.interpolate(small, size=(40, 32), mode="bicubic")
        return (big + brightness + 0.05 * torch.rand(6, 3, 40, 32, generator=g)).clamp(0, 1).mul(255).round().to(torch.uint8)

    return noise(0, 6, 0.0), noise(1, 12, 0.1)


def theirs(preset, weights, images, monkeypatch):
    """Features as the tool of a preset makes them, with its own resizing and its own network."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if preset == "fid-tf":
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

            return FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(weights))(images)[0]
        if preset == "fid-ptfid":
            from pytorch_fid import inception

            monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: torch.load(weights, weights_only=True))
            network = inception.InceptionV3([inception.InceptionV3.BLOCK_INDEX_BY_DIM[2048]]).eval()
            with torch.no_grad():
                return network(images.float() / 255)[0].flatten(1)
        from cleanfid.resize import build_resizer
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        # clean-fid's network is a TorchScript file of the same graph; torch-fidelity's runs on images that are resized already.
        network = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(weights))
        resize = build_resizer("clean")
        resized = np.stack([resize(image.permute(1, 2, 0).numpy()) for image in images])
        monkeypatch.setattr(
            "torch_fidelity.feature_extractor_inceptionv3.interpolate_bilinear_2d_like_tensorflow1x",
            lambda x, **_: torch.from_numpy(resized).permute(0, 3, 1, 2),
        )
        return network(images)[0]


@pytest.mark.parametrize("preset", ["fid-tf", "fid-ptfid", "fid-clean"])
def test_whole_path(preset, weights, images, monkeypatch):
    extractor = load_extractor(preset, weights=weights, unverified=True)
    ours = [extractor(side) for side in images]
    expected = [theirs(preset, weights, side, monkeypatch) for side in images]
    for a, b in zip(ours, expected, strict=True):
        assert (a - b).norm() / (b - b.mean(0)).norm() < 1e-4
    value = FrechetReference.from_features(ours[0]).distance_to_features(ours[1])
    mean_cov = [(x.double().mean(0).numpy(), np.cov(x.double().numpy().T)) for x in expected]
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    statistics = [{"mu": mu, "sigma": sigma} for mu, sigma in mean_cov]
    theirs_value = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert value == pytest.approx(theirs_value, rel=1e-4)


def test_presets_differ(weights, images):
    presets = ("fid-tf", "fid-ptfid", "fid-clean")
    features = {name: load_extractor(name, weights=weights, unverified=True)(images[0][:2]) for name in presets}
    for a, b in itertools.combinations(presets, 2):
        assert (features[a] - features[b]).norm() / features[a].norm() > 1e-3


def test_torchmetrics_without_antialiasing(weights, images):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchmetrics.image.fid import FrechetInceptionDistance

        metric = FrechetInceptionDistance(feature=2048, feature_extractor_weights_path=str(weights), antialias=False)
    metric.update(images[0], real=True)
    metric.update(images[1], real=False)
    extractor = load_extractor("fid-tf", weights=weights, unverified=True)
    value = FrechetReference.from_features(extractor(images[0])).distance_to_features(extractor(images[1]))
    assert value == pytest.approx(metric.compute().item(), rel=1e-4)


def test_unknown_weights_are_no_fid(weights):
    with pytest.raises(ValueError, match="SHA-256"):
        load_extractor("fid-tf", weights=weights)
    protocol = load_extractor("fid-tf", weights=weights, unverified=True).protocol
    assert "fid" not in protocol.name
    assert "not FID" in protocol.title


def test_missing_weights_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.delenv("FEWSTEP_INCEPTION_WEIGHTS", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(MissingModelError, match=r"weights-inception-2015-12-05-6726825d.pth \(95.6 MB.*https://.*put it into"):
        load_extractor("fid-tf", offline=True)
    assert not any(tmp_path.iterdir())
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    (tmp_path / "hub/checkpoints/weights-inception-2015-12-05-6726825d.pth").write_bytes(b"random")
    with pytest.raises(ValueError, match="published Inception weights"):
        load_extractor("fid-tf", offline=True)
    monkeypatch.setenv("FEWSTEP_INCEPTION_WEIGHTS", str(tmp_path / "nowhere.pth"))
    with pytest.raises(MissingModelError, match="nowhere"):
        load_extractor("fid-tf")

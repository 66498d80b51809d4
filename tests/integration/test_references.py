"""Real images from every kind of source, the npz layouts of the field, the cache, and the floor."""

import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from samplers.evaluation import frechet_floor, load_extractor, load_reference, open_images, quantise, reference_features
from samplers.reference import digit_images


@pytest.fixture(scope="module")
def extractor():
    return load_extractor()


@pytest.fixture(scope="module")
def pixels():
    return quantise((digit_images("test")[0][:12] + 1) / 2)


@pytest.fixture
def folder(tmp_path, pixels):
    (tmp_path / "images/deeper").mkdir(parents=True)
    for i, image in enumerate(pixels):
        to_pil_image(image).save(tmp_path / "images" / ("deeper" if i % 2 else ".") / f"{i:02d}.png")
    (tmp_path / "images/notes.txt").write_text("not an image")
    return tmp_path / "images"


def all_pixels(source):
    return torch.cat(list(source.batches(5)))


def test_same_images_from_every_source(folder, pixels, tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for path in folder.rglob("*.*"):
            archive.write(path, path.relative_to(folder))
    np.savez(tmp_path / "samples.npz", arr_0=pixels.permute(0, 2, 3, 1).numpy())
    wanted = sorted(image.numpy().tobytes() for image in pixels)
    for source in (folder, tmp_path / "images.zip", tmp_path / "samples.npz"):
        opened = open_images(str(source))
        assert opened.length == 12
        assert sorted(image.numpy().tobytes() for image in all_pixels(opened)) == wanted
        assert opened.id == open_images(str(source)).id


def test_torchvision(tmp_path):
    """MNIST's own file layout, with random images; nothing is downloaded."""
    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    data = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    for split in ("train", "t10k"):
        header = np.array([0x0803, 3, 28, 28], dtype=">i4").tobytes()
        (raw / f"{split}-images-idx3-ubyte").write_bytes(header + data.tobytes())
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(np.array([0x0801, 3], dtype=">i4").tobytes() + bytes([0, 1, 2]))
    opened = open_images(f"torchvision:MNIST:train:{tmp_path}")
    torch.testing.assert_close(all_pixels(opened), torch.from_numpy(data)[:, None])
    assert opened.classes().tolist() == [0, 1, 2]
    assert opened.id != open_images(f"torchvision:MNIST:test:{tmp_path}").id
    with pytest.raises(FileNotFoundError, match="nothing is downloaded"):
        open_images(f"torchvision:SVHN:train:{tmp_path / 'nowhere'}")
    for wrong in ("torchvision:Nonsense:train", "torchvision:MNIST:validation", "torchvision:CocoDetection:train"):
        with pytest.raises(ValueError, match="CLASS"):
            open_images(wrong)


def test_hugging_face_data_set(folder, tmp_path, pixels):
    datasets = pytest.importorskip("datasets", reason="the package datasets is optional")
    data = datasets.Dataset.from_dict({"label": list(range(12)), "picture": [to_pil_image(image) for image in pixels]})
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "set")
    opened = open_images(f"datasets:{tmp_path / 'set'}:train")
    torch.testing.assert_close(all_pixels(opened), pixels)
    assert opened.classes().tolist() == list(range(12))
    with pytest.raises(ValueError, match="no image column; it has label, picture"):
        open_images(f"datasets:{tmp_path / 'set'}:train:image")


def test_sources_that_are_none(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("x")
    np.savez(tmp_path / "float.npz", arr_0=np.zeros((2, 8, 8, 3)))
    for source, message in [("empty", "no images"), ("text.txt", "no set of images"), ("float.npz", "uint8")]:
        with pytest.raises(ValueError, match=message):
            open_images(str(tmp_path / source))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_images("nowhere")
    with pytest.raises(ValueError, match="unknown split"):
        open_images("digits:validation")


def test_images_of_several_sizes(tmp_path, extractor):
    for i, size in enumerate([(8, 8), (8, 8), (40, 60), (16, 8)]):
        Image.new("RGB", size, (i, 2 * i, 90)).save(tmp_path / f"{i}.png")
    assert reference_features(str(tmp_path), extractor).moments.n == 4
    with pytest.raises(ValueError, match="images of one size"):
        reference_features(str(tmp_path), load_extractor("fd-pixel"))


def test_cache_is_used_and_noticed_when_stale(folder, tmp_path, extractor, pixels, monkeypatch):
    cache = tmp_path / "cache"
    first = reference_features(str(folder), extractor, cache=cache)
    assert len(list(cache.glob("reference-*.npz"))) == 1
    monkeypatch.setattr("samplers.evaluation.references.extract", None)
    again = reference_features(str(folder), extractor, cache=cache)
    assert again.id == first.id
    torch.testing.assert_close(again.features, first.features, rtol=0, atol=0)
    monkeypatch.undo()
    (folder / "00.png").unlink()
    assert reference_features(str(folder), extractor, cache=cache).moments.n == 11


LAYOUTS = {
    "EDM and pytorch-fid": {},
    "ADM": {"mu_s": np.zeros(3), "sigma_s": np.eye(3), "arr_0": np.zeros((2, 8, 8, 3), np.uint8)},
    "with n": {"n": np.int64(50_000)},
}


@pytest.mark.parametrize("extra", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_of_the_field(tmp_path, extractor, extra):
    """ADM's file also holds images and other moments: only mu and sigma are the FID's reference."""
    mu, sigma = np.arange(64.0), np.eye(64) * 2
    np.savez(tmp_path / "stats.npz", mu=mu, sigma=sigma, **extra)
    with pytest.raises(ValueError, match="does not say how its features were made"):
        load_reference(tmp_path / "stats.npz", extractor.protocol)
    with pytest.raises(ValueError, match="cannot be compared"):
        load_reference(tmp_path / "stats.npz", extractor.protocol, declared="fid-tf")
    loaded = reference_features(str(tmp_path / "stats.npz"), extractor, declared="fd-randconv64-v1")
    assert loaded.moments.mean.tolist() == mu.tolist()
    assert loaded.moments.cov.tolist() == sigma.tolist()
    assert loaded.moments.n == (50_000 if "n" in extra else None)
    loaded.save(tmp_path / "ours.npz")
    assert load_reference(tmp_path / "ours.npz", extractor.protocol).id == loaded.id


def test_pickled_arrays_are_refused(tmp_path, extractor):
    np.savez(tmp_path / "stats.npz", mu=np.array([print], dtype=object), sigma=np.eye(1))
    with pytest.raises(ValueError, match="pickle"):
        load_reference(tmp_path / "stats.npz", extractor.protocol, declared="fd-randconv64-v1")


def test_floors(extractor, generator):
    """Measured with enough held-out images, on the 1/N line with fewer, by halves without any, none from moments."""
    digits = reference_features("digits", extractor)
    measured = frechet_floor(digits, extractor.protocol, 300, generator=generator())
    line = frechet_floor(digits, extractor.protocol, 3000, generator=generator())
    assert (measured.n, line.n) == (300, 3000)
    assert "extrapolated" in line.method
    assert 0 < line.value < measured.value
    halves = frechet_floor(reference_features("digits:all", extractor), extractor.protocol, 5000, generator=generator())
    assert halves.n == 899
    assert "halves" in halves.method
    moments = type(digits)(digits.name, digits.id, digits.protocol, digits.moments)
    assert frechet_floor(moments, extractor.protocol, 300, generator=generator()) is None

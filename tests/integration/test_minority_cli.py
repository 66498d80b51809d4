"""fewstep minority: score, train, sample, on the shipped digits."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fewstep import app
from samplers.evaluation import inputs_for, open_images
from samplers.guidance import MinorityClassifier, read_scores
from samplers.reference import load

runner = CliRunner()


def fewstep(*arguments: str) -> dict:
    result = runner.invoke(app, ["minority", *arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("minority") / "scores"
    fewstep("score", "--model", "digits", "--data", "digits:test", "--out", str(out), "--draws", "1", "--sheet", "20")
    return out


@pytest.fixture(scope="module")
def trained(scored) -> Path:
    out = scored.parent / "classifier.safetensors"
    fewstep("train", "--scores", str(scored / "scores.safetensors"), "--out", str(out), "--steps", "30", "--parts", "3",
            "--width", "16", "--depth", "1", "--train-batch", "64")  # fmt: skip
    return out


def test_score(scored):
    scores, settings = read_scores(scored / "scores.safetensors")
    assert scores.shape == (360,)
    assert settings["model"] == "digits"
    record = json.loads((scored / "score.json").read_text())
    top = scores.argsort(descending=True, stable=True)[:20].tolist()
    assert [entry["image"] for entry in record["rarest"]] == top
    variance = record["top_variance"]
    assert record["level"] * variance / (1 - record["level"]) == pytest.approx(0.4, rel=1e-6)
    assert (scored / "rarest.png").is_file()
    assert (scored / "scores.png").is_file()


def test_scoring_again_changes_nothing_and_other_settings_are_refused(scored):
    before = (scored / "scores.safetensors").read_bytes()
    arguments = ["--model", "digits", "--data", "digits:test", "--out", str(scored), "--sheet", "20", "--json"]
    assert runner.invoke(app, ["minority", "score", *arguments, "--draws", "1"]).exit_code == 0
    assert (scored / "scores.safetensors").read_bytes() == before
    other = runner.invoke(app, ["minority", "score", *arguments, "--draws", "2"])
    assert isinstance(other.exception, ValueError)
    assert "draws differ" in str(other.exception)
    assert (scored / "scores.safetensors").read_bytes() == before


def test_train(trained):
    classifier = MinorityClassifier.load(trained)
    assert (classifier.shape, classifier.bins, classifier.parts) == ((1, 8, 8), 10, 3)
    assert classifier.facts["scores"]["data"] == "digits:test"
    assert classifier.facts["rarest_parts"] == 36
    assert not trained.with_name(trained.name + ".checkpoint").exists()
    kinds = classifier.facts["kinds"]
    assert sum(kind["images"] for kind in kinds) == 36
    assert all(0 < kind["share"] < 1 for kind in kinds)
    assert trained.with_name("classifier-kinds.png").is_file()


def test_marked_kinds(scored, tmp_path, monkeypatch):
    scores, sheet = str(scored / "scores.safetensors"), tmp_path / "alike.png"
    assert (scored / "rarest-numbered.png").is_file()
    labels = open_images("digits:test").classes()
    ones = (labels == 1).nonzero().flatten()[:8].tolist()
    examples = ",".join(map(str, ones))
    found = fewstep("alike", "--scores", scores, "--images", examples, "--out", str(sheet), "--count", "12")
    numbers = [entry["image"] for entry in found["alike"]]
    assert sheet.is_file()
    assert len(numbers) == 12
    assert not set(numbers) & set(ones)
    monkeypatch.setattr("samplers.commands.minority_alike._FITTED", 340)  # the rest are compared without being fitted to
    again = fewstep("alike", "--scores", scores, "--images", examples, "--out", str(sheet), "--count", "12")
    assert len(set(numbers) & {entry["image"] for entry in again["alike"]}) >= 8
    assert (labels[numbers] == 1).double().mean() >= 0.5  # a tenth by chance
    out = tmp_path / "kind.safetensors"
    zeros = ",".join(map(str, (labels == 0).nonzero().flatten()[:5].tolist()))
    small = ["--steps", "5", "--width", "8", "--depth", "1", "--train-batch", "16"]
    fewstep("train", "--scores", scores, "--out", str(out), "--kind", examples, "--kind", zeros, *small)
    classifier = MinorityClassifier.load(out)
    assert (classifier.bins, classifier.parts) == (2, 2)
    assert [kind["images"] for kind in classifier.facts["kinds"]] == [8, 5]
    for extra, message in ((["--kind", "3", "--bins", "5"], "takes the place"), (["--kind", "360"], "no sample 360")):
        refused = runner.invoke(app, ["minority", "train", "--scores", scores, "--out", str(tmp_path / "x"), *extra])
        assert message in str(refused.exception)
    refused = runner.invoke(app, ["minority", "alike", "--scores", scores, "--images", "400", "--out", str(sheet)])
    assert "--images must name images 0..359" in str(refused.exception)


def test_sample_and_report(trained, tmp_path):
    out = tmp_path / "run"
    arguments = ["sample", "--classifier", str(trained), "--nfe", "3", "--num", "12", "--out", str(out), "--label", "each",
                 "--reference", "120", "--rejection", "2", "--batch-size", "8", "--scale", "8"]  # fmt: skip
    record = fewstep(*arguments)
    assert set(record["table"]) == {"real, common", "real, rare", "unguided", "guided", "rejection, 1 of 2"}
    rows = record["table"]
    assert rows["real, rare"]["average_knn"] > rows["real, common"]["average_knn"]
    page = (out / "report.html").read_text()
    for name in (*rows, "off manifold", "guided.png"):
        assert name in page
    pictures = {file: file.read_bytes() for file in (out / "guided").glob("*.png")}
    assert len(pictures) == 12
    for file in sorted(pictures)[5:]:
        file.unlink()
    fewstep(*arguments)  # completes what is missing, image by image the same
    assert {file: file.read_bytes() for file in (out / "guided").glob("*.png")} == pictures
    other = runner.invoke(app, ["minority", *arguments[:-1], "2"])
    assert "scale differ" in str(other.exception)


def test_missing_kinds_are_those_the_unguided_images_have_least_of(trained, tmp_path):
    out = tmp_path / "run"
    record = fewstep("sample", "--classifier", str(trained), "--nfe", "2", "--num", "12", "--out", str(out),
                     "--label", "missing:2", "--reference", "120")  # fmt: skip
    kinds = record["kinds"]
    surplus = [(found - real) / real**0.5 for found, real in zip(kinds["unguided"], kinds["real"], strict=True)]
    assert record["label"] == "part:" + ",".join(str(k) for k in sorted(range(3), key=surplus.__getitem__)[:2])
    assert f"missing:2 ({record['label']})" in (out / "report.html").read_text()


@pytest.mark.slow
def test_features_of_the_model_as_the_distance(tmp_path):
    """The whitening is kept beside the scores, is used again when scoring goes on, and travels with the classifier."""
    scores, classifier = tmp_path / "scores", tmp_path / "classifier.safetensors"
    arguments = ["score", "--model", "digits", "--data", "digits:test", "--out", str(scores), "--draws", "1",
                 "--distance", "features"]  # fmt: skip
    first = fewstep(*arguments)
    kept = (scores / "whitening.safetensors").read_bytes()
    (scores / "scores.safetensors").unlink()
    assert fewstep(*arguments)["rarest"] == first["rarest"]
    assert (scores / "whitening.safetensors").read_bytes() == kept
    fewstep("train", "--scores", str(scores / "scores.safetensors"), "--out", str(classifier), "--steps", "5", "--parts", "2")
    assert set(MinorityClassifier.load(classifier).tensors) == {"whitening.mean", "whitening.matrix"}
    (scores / "whitening.safetensors").unlink()
    record = fewstep("sample", "--classifier", str(classifier), "--nfe", "2", "--num", "6", "--reference", "120",
                     "--out", str(tmp_path / "run"))  # fmt: skip
    assert record["table"]["guided"]["minority_score"] > 0


@pytest.mark.slow
def test_rare_within_a_class(tmp_path):
    """Scores know the class, bins are cut in every class, images are guided within the class they are asked for."""
    scores, classifier, out = tmp_path / "scores", tmp_path / "classifier.safetensors", tmp_path / "run"
    fewstep("score", "--model", "digits-conditional", "--data", "digits:test", "--out", str(scores), "--draws", "1",
            "--within-class")  # fmt: skip
    _, settings = read_scores(scores / "scores.safetensors")
    assert settings["within_class"] is True
    fewstep("train", "--scores", str(scores / "scores.safetensors"), "--out", str(classifier), "--steps", "10", "--parts", "2",
            "--width", "16", "--depth", "1", "--train-batch", "64")  # fmt: skip
    found = MinorityClassifier.load(classifier)
    assert found.classes == 10
    classes = open_images("digits:test").classes()
    assert found.facts["rarest_parts"] == sum(int(n) // 10 for n in classes.bincount())
    arguments = ["--classifier", str(classifier), "--nfe", "2", "--num", "6", "--out", str(out), "--reference", "120"]
    refused = runner.invoke(app, ["minority", "sample", *arguments, "--class-labels", "10"])
    assert "knows the classes 0..9" in str(refused.exception)
    record = fewstep("sample", *arguments, "--class-labels", "3,5,5", "--guidance", "1.5", "--rejection", "2")
    assert set(record["table"]) >= {"guided", "rejection, 1 of 2"}
    assert json.loads((out / "request.json").read_text())["class_labels"] == [3, 5, 5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--label", "missing:4"], "1..3"),
        (["--label", "missing"], "missing:K"),
        (["--class-labels", "3"], "takes no class_labels"),
        (["--label", "11"], "outside -10..9"),
        (["--label", "part:7"], "0..2"),
        (["--window", "0.5"], "--window"),
        (["--window", "0.5,0.1"], "window must be"),
        (["--sampler", "nonsense"], "unknown schedule"),
        (["--scale", "-1"], "scale must be"),
    ],
)
def test_bad_requests_leave_no_folder(trained, tmp_path, arguments, message):
    out = tmp_path / "run"
    base = ["minority", "sample", "--classifier", str(trained), "--nfe", "3", "--num", "4", "--out", str(out)]
    result = runner.invoke(app, [*base, *arguments])
    assert message in str(result.exception)
    assert not out.exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["score", "--data", "nowhere", "--out", "x"], "no images at"),
        (["score", "--data", "digits", "--out", "x", "--level", "2"], "alpha_bar must lie"),
        (["score", "--data", "digits", "--out", "x", "--level", "much"], "--level"),
        (["score", "--data", "digits", "--out", "x", "--distance", "l3"], "known: l2"),
        (["score", "--data", "digits", "--out", "x", "--prompt", "a cat"], "takes no prompt"),
        (["score", "--data", "digits", "--out", "x", "--within-class"], "needs a class-conditional model"),
        (["train", "--scores", "nowhere.safetensors", "--out", "x"], "no scores"),
        (["sample", "--classifier", "nowhere", "--nfe", "3", "--out", "x"], "no minority classifier"),
    ],
)
def test_bad_input_is_one_message(command, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = runner.invoke(app, ["minority", *command])
    assert result.exit_code != 0
    assert message in str(result.exception)
    assert not (tmp_path / "x").exists()


def test_images_as_the_model_takes_them(tmp_path):
    from PIL import Image

    Image.new("RGB", (30, 20), (255, 0, 0)).save(tmp_path / "a.png")
    Image.new("L", (8, 8), 255).save(tmp_path / "b.png")
    inputs = inputs_for(load("digits"), open_images(str(tmp_path)))
    x = inputs[[0, 1]]
    assert x.shape == (2, 1, 8, 8)
    torch.testing.assert_close(x[0], torch.full((1, 8, 8), 2 * 0.299 - 1), rtol=0, atol=1e-5)
    torch.testing.assert_close(x[1], torch.ones(1, 8, 8))


def test_classes_of_images(tmp_path):
    import numpy as np
    from PIL import Image

    for name in ("dog/a.png", "cat/b.png", "dog/deep/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), 9).save(tmp_path / name)
    assert open_images(str(tmp_path)).classes().tolist() == [0, 1, 1]  # cat, dog, dog: as the files are sorted
    array = np.zeros((2, 4, 4, 1), np.uint8)
    np.savez(tmp_path / "known.npz", arr_0=array, arr_1=np.array([4, 2]))
    np.savez(tmp_path / "unknown.npz", arr_0=array)
    assert open_images(str(tmp_path / "known.npz")).classes().tolist() == [4, 2]
    with pytest.raises(ValueError, match="knows no classes"):
        open_images(str(tmp_path / "unknown.npz")).classes()
    assert open_images("digits:test").classes().bincount().sum() == 360


def test_latents_of_a_pipeline_with_an_autoencoder(build, tmp_path):
    from PIL import Image

    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "a.png")
    pipe = build("sd").pipe
    inputs = inputs_for(pipe, open_images(str(tmp_path)), height=8, width=8)
    x = torch.tensor([1.0, -1.0, -1.0])[:, None, None].expand(1, 3, 8, 8)
    expected = pipe.vae.encode(x).latent_dist.mean.detach() * pipe.vae.config.scaling_factor
    torch.testing.assert_close(inputs[[0]], expected)
    with pytest.raises(ValueError, match="packs its latents"):
        inputs_for(build("flux").pipe, open_images(str(tmp_path)))

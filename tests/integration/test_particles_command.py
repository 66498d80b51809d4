"""`fewstep sample --target`: corrected images, their weights and the page; contradictions leave no trace."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import fewstep as command_line
from samplers.denoisers import GaussianMixture
from samplers.noise import NoiseSchedule
from samplers.particles import FeynmanKac, Target, trace_figure, trace_page


def fewstep(*arguments: str) -> Any:
    return CliRunner().invoke(command_line.app, ["sample", *arguments])


@pytest.mark.slow
def test_corrected_images_with_their_weights(tmp_path: Path) -> None:
    shared = ("--sampler", "euler_ancestral", "--nfe", "6", "--target", "cfg:2.0", "--particles", "4")
    result = fewstep(*shared, "--num", "3", "--class-labels", "3,5", "--out", str(tmp_path / "a"), "--json")
    assert result.exit_code == 0, result.exception
    record = json.loads(result.stdout.splitlines()[-1])
    assert record["counted_nfe"] == 6
    assert record["settings"]["target"] == "cfg:2.0"
    weights = json.loads((tmp_path / "a" / "particles.json").read_text())
    assert sorted(weights) == ["0", "1", "2"]
    assert all(len(entry["log_w"]) == 4 and 0 <= entry["kept"] < 4 for entry in weights.values())
    assert "image 2" in (tmp_path / "a" / "particles.html").read_text()
    # the page is of the last batch, the weights of all; and an image does not depend on its batch
    alone = fewstep(*shared, "--num", "3", "--class-labels", "3,5", "--out", str(tmp_path / "b"), "--batch-size", "4")
    assert alone.exit_code == 0, alone.exception
    again = json.loads((tmp_path / "b" / "particles.json").read_text())
    for name, entry in weights.items():
        assert again[name]["kept"] == entry["kept"]
        assert again[name]["log_z"] == pytest.approx(entry["log_z"], abs=1e-3)
    page = (tmp_path / "b" / "particles.html").read_text()
    assert "images 2 to 2" in page
    assert page.count("<img") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target", "cfg:2.0", "--sampler", "unipc"), "is an ODE"),
        (("--particles", "4", "--sampler", "ddpm"), "needs --target"),
        (("--target", "cfg:2", "--guidance", "3", "--sampler", "ddpm"), "leave --guidance out"),
        (("--target", "model", "--sampler", "ddpm"), "particles weigh nothing"),
        (("--target", "power:2", "--sampler", "ddpm"), "another start than N"),
        (("--target", "nonsense", "--sampler", "ddpm"), "unknown target 'nonsense'"),
    ],
)
def test_contradictions(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    result = fewstep(*arguments, "--nfe", "4", "--num", "2", "--particles", "4", "--out", str(tmp_path / "out"))
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_figure_and_page(tmp_path: Path) -> None:
    ns = NoiseSchedule.edm(0.01, 20.0)
    models = {"uncond": torch.tensor([0.0]), "cond": torch.tensor([2.0])}
    denoisers = {name: GaussianMixture(mean[None], torch.ones(1)).denoiser(ns) for name, mean in models.items()}
    cloud = FeynmanKac(Target.cfg(4.0)).sample(
        denoisers, ns, torch.logspace(1, -1, 9), particles=5, shape=(1,), groups=2, generator=torch.Generator().manual_seed(0)
    )
    pictures = [torch.rand(1, 4, 4), torch.rand(3, 4, 4)]
    page = trace_page(cloud.trace, tmp_path / "p.html", names=["<first>"], images=torch.rand(5, 3, 4, 4))
    assert trace_page(cloud.trace, tmp_path / "r.html", kept=[4, 0], pictures=pictures).read_text().count("<img") == 3
    text = page.read_text()
    assert "&lt;first&gt;" in text
    assert text.count("<tr>") == 3
    assert (tmp_path / "p.png").stat().st_size > 5000
    with pytest.raises(ValueError, match=r"group 2 is outside 0..1"):
        trace_figure(cloud.trace, tmp_path / "q.png", group=2)
    with pytest.raises(ValueError, match=r"kept particle 5 is outside 0..4"):
        trace_figure(cloud.trace, tmp_path / "q.png", kept=5)
    with pytest.raises(ValueError, match="2 images for 5 particles"):
        trace_figure(cloud.trace, tmp_path / "q.png", images=torch.rand(2, 1, 4, 4))

"""Published schedules from file to samples: converted, shown, run on the reference pipeline and in Stable Diffusion."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from tiny_pipelines.harness import Tiny
from typer.testing import CliRunner

from samplers import NoiseSchedule, SolverSchedule, recipe, sample
from samplers.commands.schedule import app
from samplers.denoisers import from_network
from samplers.peers import load_usf
from samplers.reference import load
from samplers.schedulers import SolverScheduler, swap
from samplers.statistics import EmpiricalStatistics

FOLDER = Path(__file__).parent.parent / "golden" / "usf"
RUNNER = CliRunner()


def _published(name: str, afs: str | None = None) -> dict[str, Any]:
    mapping = json.loads((FOLDER / f"{name}.json").read_text())
    return {key: value for key, value in mapping.items() if key not in ("nfe", "noise_schedule")} | (
        {"afs": afs} if afs else {}
    )


def _waves(noise: NoiseSchedule, shape: tuple[int, ...], nodes: int = 40) -> EmpiricalStatistics:
    """Plausible statistics: from data to noise prediction as sampling goes on, a little different in every element."""
    ends = noise.lam(torch.tensor([noise.t_max, noise.t_min], dtype=torch.float64)).tolist()
    lam = torch.linspace(*ends, nodes + 1, dtype=torch.float64)
    slope = 1 + 0.1 * torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    l = torch.sigmoid(-2 * lam.reshape(-1, *[1] * len(shape)) * slope)
    return EmpiricalStatistics(lam, l, l - 1, 0.05 * torch.sin(lam.reshape(-1, *[1] * len(shape)) * slope))


# evaluations -> published steps, and the analytic first step that saves one
PLANS = {3: (3, None), 4: (4, "no_afs"), 5: (6, "zero_x0"), 6: (6, "no_afs"), 7: (8, "zero_x0"), 8: (8, "no_afs")}
PLANS |= {9: (10, "zero_x0"), 10: (10, "no_afs")}


@pytest.mark.parametrize(
    ("nfe", "kind"),
    [pytest.param(nfe, kind, marks=() if nfe == 5 else pytest.mark.slow) for nfe in PLANS for kind in ("basic", "v3")],
)
def test_convert_show_and_sample_on_the_reference_pipeline(nfe: int, kind: str, tmp_path: Path) -> None:
    steps, afs = PLANS[nfe]
    source, out, path = tmp_path / "published.pth", tmp_path / "mine.json", tmp_path / "statistics.safetensors"
    mapping = _published(f"img-{steps}step-{kind}", afs)
    source.write_bytes(pickle.dumps([mapping, 4.5]))
    done = RUNNER.invoke(app, ["convert", str(source), "--from", "usf", "--out", str(out), "--noise", "ddpm"])
    assert done.exit_code == 0, done.output
    assert f"{nfe} network evaluations" in done.output
    assert ("needs empirical model statistics" in done.output) == ("dpmsolver_v3_prediction" in mapping["prediction_types"])

    pipe = load("digits")
    noise = NoiseSchedule.from_config(pipe.scheduler.config)
    shape = (pipe.unet.config.in_channels, *[pipe.unet.config.sample_size] * 2)
    statistics = _waves(noise, shape)
    statistics.save(path)
    shown = RUNNER.invoke(app, ["show", str(out), "--noise", "ddpm", "--statistics", str(path)])
    assert shown.exit_code == 0, shown.output

    ours, theirs = SolverSchedule.load(out), SolverSchedule.from_usf(mapping)
    assert ours.nfe == nfe == theirs.nfe
    counted: list[int] = []
    handle = pipe.unet.register_forward_hook(lambda *_: counted.append(1))
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    denoiser = from_network(pipe.unet, noise)
    with torch.no_grad():
        a, b = (sample(denoiser, x, schedule, noise, statistics=statistics) for schedule in (ours, theirs))
    assert torch.equal(a, b)
    assert torch.isfinite(a).all()
    with swap(pipe, ours, statistics=str(path)):
        pipe(batch_size=2, num_inference_steps=nfe, output_type="np", generator=torch.Generator().manual_seed(0))
    handle.remove()
    assert len(counted) == 3 * nfe


@pytest.mark.parametrize("afs", ["no_afs", "zero_x0", "average_x0"])
def test_the_same_schedule_in_stable_diffusion(afs: str, build: Callable[..., Tiny], tmp_path: Path) -> None:
    """NFE is counted, with and without the analytic first step; the pipeline agrees with the native loop's arithmetic."""
    tiny = build("sd")
    source, path, mean = tmp_path / "published.json", tmp_path / "statistics.safetensors", tmp_path / "mean.safetensors"
    source.write_text(json.dumps(_published("sd-10step-v3", afs)))
    schedule = load_usf(source)
    noise = NoiseSchedule.from_config(tiny.pipe.scheduler.config)
    shape = tuple(tiny(1).shape[1:])
    _waves(noise, shape).save(path)
    extra = {"statistics": str(path)}
    if afs == "average_x0":
        save_file({"mean": torch.zeros(shape)}, mean)
        extra["first_x0"] = str(mean)
    nfe = 10 - (afs != "no_afs")
    assert schedule.nfe == nfe
    old = tiny.pipe.scheduler
    tiny.pipe.scheduler = SolverScheduler.from_config(old.config, schedule=schedule.to_dict(), **extra)
    with tiny.counting() as calls:
        pixelwise = tiny(nfe)
    assert len(calls) == nfe
    assert torch.isfinite(pixelwise).all()
    scalar = _waves(noise, ())
    tiny.pipe.scheduler = SolverScheduler.from_config(old.config, schedule=scalar.embed(schedule).to_dict(), **extra)
    assert torch.equal(tiny(nfe), pixelwise)  # statistics that are given win over those inside
    extra.pop("statistics")
    tiny.pipe.scheduler = SolverScheduler.from_config(old.config, schedule=scalar.embed(schedule).to_dict(), **extra)
    assert not torch.equal(tiny(nfe), pixelwise)


def test_statistics_by_path_survive_saving(build: Callable[..., Tiny], tmp_path: Path) -> None:
    tiny = build("sd")
    path = tmp_path / "statistics.safetensors"
    shape = tuple(tiny(1).shape[1:])
    _waves(NoiseSchedule.from_config(tiny.pipe.scheduler.config), shape).save(path)
    with pytest.raises(ValueError, match=r"pred 'v3' needs the model's empirical statistics"):
        SolverScheduler.from_config(tiny.pipe.scheduler.config, schedule="dpm_v3").set_timesteps(5)
    tiny.pipe.scheduler = SolverScheduler.from_config(tiny.pipe.scheduler.config, schedule="dpm_v3", statistics=str(path))
    expected = tiny(5)
    tiny.pipe.save_pretrained(tmp_path / "pipe")
    absent = dict.fromkeys(tiny.absent)
    tiny.pipe = DiffusionPipeline.from_pretrained(tmp_path / "pipe", **absent)
    tiny.__post_init__()
    assert torch.equal(tiny(5), expected)
    assert tiny.pipe.scheduler.config.statistics == str(path)
    path.rename(tmp_path / "elsewhere.safetensors")
    with pytest.raises(FileNotFoundError, match=r"statistics: no file .*statistics\.safetensors.* pass statistics=NEW_PATH"):
        DiffusionPipeline.from_pretrained(tmp_path / "pipe", **absent)
    moved = SolverScheduler.from_pretrained(
        tmp_path / "pipe", subfolder="scheduler", statistics=str(tmp_path / "elsewhere.safetensors")
    )
    tiny.pipe.scheduler = moved
    assert torch.equal(tiny(5), expected)


def test_late_entry_keeps_the_statistics(build: Callable[..., Tiny], tmp_path: Path) -> None:
    """Image-to-image enters in the middle; steps that lost their history become first-order data steps."""
    tiny = build("sd")
    shape = tuple(tiny(1).shape[1:])
    noise = NoiseSchedule.from_config(tiny.pipe.scheduler.config)
    _waves(noise, shape).save(tmp_path / "statistics.safetensors")
    scheduler = SolverScheduler.from_config(
        tiny.pipe.scheduler.config, schedule="dpm_v3:order=2", statistics=str(tmp_path / "statistics.safetensors")
    )
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(2)
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps[2:]:
        x = scheduler.step(0.1 * x, t, x, return_dict=False)[0]
    assert torch.isfinite(x).all()
    assert scheduler.step_index == 6


@pytest.mark.slow
def test_statistics_of_the_reference_pipeline() -> None:
    """Estimated with forward-mode derivatives through a real network with attention, they improve the first order."""
    pipe = load("digits")
    noise = NoiseSchedule.from_config(pipe.scheduler.config)
    shape = (pipe.unet.config.in_channels, *[pipe.unet.config.sample_size] * 2)
    pipe.unet.requires_grad_(False)
    denoiser, generator = from_network(pipe.unet, noise), torch.Generator().manual_seed(0)

    def run(text: str, nfe: int, x: torch.Tensor, statistics: EmpiricalStatistics | None = None) -> torch.Tensor:
        return sample(denoiser, x, recipe(text, noise, nfe), noise, statistics=statistics)

    with torch.no_grad():
        teacher = run("unipc:order=3,grid=lambda,final=sigma_min", 20, torch.randn(32, *shape, generator=generator))
        statistics = EmpiricalStatistics.estimate(denoiser, noise, teacher, 24, generator)
        x = torch.randn(32, *shape, generator=torch.Generator().manual_seed(9))
        exact = run("unipc:order=3,grid=lambda,final=sigma_min", 50, x)
        grid = "grid=lambda,final=sigma_min"
        ddim, v3 = (
            (run(f"{text},{grid}", 10, x, statistics) - exact).square().mean().sqrt().item()
            for text in ("dpmpp:order=1", "dpm_v3:order=1,corrector=none")
        )
    assert v3 < 0.95 * ddim

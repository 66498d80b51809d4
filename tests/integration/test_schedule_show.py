"""``fewstep schedule show``: the table says what the schedule is, the picture holds it, and comparisons tell the truth."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from samplers import NoiseSchedule, SolverSchedule, Tableau, recipe, sample
from samplers.commands import schedule as command
from samplers.denoisers import GaussianMixture
from samplers.evaluation import answer_weights, schedule_figure
from samplers.peers import Midpoint, compensated, from_midpoints

VP, EDM = NoiseSchedule.vp_linear(), NoiseSchedule.edm()


@pytest.fixture
def show(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Output of ``schedule show`` on one wide line per row."""
    monkeypatch.setattr(command, "out_console", command.out_console)
    from samplers.commands import common

    monkeypatch.setattr(common.out_console, "_width", 400)

    def run(*args: object) -> str:
        result = CliRunner().invoke(command.app, ["show", *map(str, args)])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.output

    return run


def test_every_step_in_words(show: Callable[..., str]) -> None:
    out = show("unipc:order=3,grid=lambda", "--nfe", 5, "--noise", "vp_linear")
    assert "NFE 5, 5 steps, noise schedule vp_linear" in out
    lines = [line for line in out.splitlines() if "order 3, x0" in line]
    assert len(lines) == 1
    assert "nodes 2, 1, 0" in lines[0]
    assert "order 4" in lines[0]  # the corrector
    assert "x3 = " in lines[0]


def test_what_is_special_is_said(show: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "epd.json"
    points = [[Midpoint(0.3, 0.4), Midpoint(0.7, 0.6, time=1.1)]] * 2
    from_midpoints(EDM, [80.0, 3.0, 0.1], points, gammas=[0.0, 0.05], name="parallel").save(path)
    out = show(path)  # the file says which noise schedule it belongs to
    for text in ("parallel: NFE 6", "noise schedule edm", "4 evaluations in a row", "draws noise", "adds noise", "told t ="):
        assert text in out
    compensated(recipe("unipc:order=2", VP, 5), [1, 1, 0.9, 1, 1]).save(path)
    assert "history at rho = 0.9" in show(path)
    assert "no evaluation: zero_x0" in show("dpmpp:afs=zero_x0", "--nfe", 4)
    assert "from 0" in show("dpm:order=2", "--nfe", 4)


def test_comparisons(show: Callable[..., str], tmp_path: Path) -> None:
    assert "the same solver" in show("--compare", "dpmpp:order=2", "dpmpp_2m", "--nfe", 6)
    differing = show("--compare", "dpmpp:order=2", "unipc:order=2", "--nfe", 6, "--plot", tmp_path / "both.png")
    assert "times differ by up to 0, weights of the network's answers by up to" in differing
    with Image.open(tmp_path / "both.png") as picture:
        assert min(picture.size) > 500
    assert "NFE 5 and 5, 5 and 6 steps" in show("--compare", "ddim", "ddim:afs=zero_x0", "--nfe", 5)
    both = json.loads(show("--compare", "ddim", "heun", "--nfe", 5, "--json"))
    assert [one["nfe"] for one in both] == [5, 5]


def test_one_sampler_or_two(show: Callable[..., str]) -> None:
    with pytest.raises(ValueError, match="give either one sampler, or two"):
        show()
    with pytest.raises(ValueError, match="give either one sampler, or two"):
        show("ddim", "--compare", "ddim", "heun", "--nfe", 4)


@pytest.mark.parametrize("text", ["unipc:order=3", "heun", "dpmpp:order=3,afs=zero_x0", "dpm:order=3", "lms"])
def test_weights_of_the_answers_reproduce_the_run(text: str) -> None:
    """Every state is the sum of the answers with these weights: checked on a run whose answers are recorded."""
    g = torch.Generator().manual_seed(0)
    law = GaussianMixture(torch.randn(3, 4, generator=g), torch.tensor([0.2, 0.5, 0.3]))
    exact, answers = law.denoiser(VP), []

    def denoiser(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        answers.append(exact(x, t))
        return answers[-1]

    schedule = recipe(f"{text}{',' if ':' in text else ':'}final=sigma_min", VP, 6)
    x = torch.randn(5, 4, generator=g, dtype=torch.float64)
    _, states = sample(denoiser, x, schedule, VP, trajectory=True)
    table, start = answer_weights(Tableau.build(schedule, VP))
    assert table.shape == (len(schedule.steps), 6)
    for i, state in enumerate(states[1:]):
        rebuilt = start[i] * x + sum(w * answer for w, answer in zip(table[i], answers, strict=True))
        torch.testing.assert_close(rebuilt, state, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("text", ["restart", "ddim:afs=average_x0", "sa_solver", "tcd"])
def test_every_kind_can_be_drawn(text: str, tmp_path: Path) -> None:
    noise = NoiseSchedule.from_config({"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"})
    schedule: SolverSchedule = recipe(text, noise, 9)
    schedule_figure([schedule, recipe("heun", NoiseSchedule.flow(), 9)], [noise, NoiseSchedule.flow()], tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.format == "PNG"
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]

"""Saving and loading of `SolverScheduler`, and the ways a schedule can be named."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
)
from safetensors.torch import save_file
from torch import Tensor

from samplers import RECIPES, NoiseSchedule, SolverSchedule, parse_recipe, recipe
from samplers.schedulers import SolverScheduler

SOURCES = [
    DDIMScheduler(beta_schedule="scaled_linear", steps_offset=1, set_alpha_to_one=False),
    DPMSolverMultistepScheduler(thresholding=True, prediction_type="v_prediction", rescale_betas_zero_snr=True),
    FlowMatchEulerDiscreteScheduler(shift=3.0),
    EDMEulerScheduler(sigma_max=40.0),
]
every_source = pytest.mark.parametrize("source", SOURCES, ids=lambda source: type(source).__name__)


@pytest.fixture
def fixed() -> SolverSchedule:
    """A schedule of five evaluations, as a search would leave it."""
    found = recipe("unipc:order=3", NoiseSchedule.from_config(DDIMScheduler().config), 5)
    return SolverSchedule(times=found.times, steps=found.steps, name="found", provenance={"by": "a test"})


def _run(scheduler: SolverScheduler, x: Tensor, tools: Any, steps: int = 5) -> Tensor:
    scheduler.set_timesteps(steps)
    return tools.loop(scheduler, x * scheduler.init_noise_sigma)


# ---- folders -----------------------------------------------------------------------------------------------------


@every_source
@pytest.mark.parametrize("text", ["dpmpp:order=2", "unipc:order=3,grid=karras"])
def test_saved_and_loaded(text: str, source: SchedulerMixin, x: Tensor, tools: Any, tmp_path: Path) -> None:
    before = SolverScheduler.from_config(source.config, schedule=text)
    before.save_pretrained(tmp_path)
    after = SolverScheduler.from_pretrained(tmp_path)
    assert {key: value for key, value in before.config.items() if key != "_use_default_values"} == dict(after.config)
    assert after.config.schedule == text
    assert torch.equal(_run(after, x, tools), _run(before, x, tools))


@every_source
def test_another_schedulers_folder(source: SchedulerMixin, x: Tensor, tools: Any, tmp_path: Path) -> None:
    """The folder of the in-tree scheduler, as in every pipeline on disk."""
    source.save_pretrained(tmp_path)
    loaded = SolverScheduler.from_pretrained(tmp_path, schedule="unipc:order=2")
    swapped = SolverScheduler.from_config(source.config, schedule="unipc:order=2")
    assert loaded.model_config.family == swapped.model_config.family
    assert torch.equal(_run(loaded, x, tools), _run(swapped, x, tools))


def test_a_swap_of_a_swap(x: Tensor, tools: Any) -> None:
    first = SolverScheduler.from_config(SOURCES[0].config, schedule="ddim")
    second = SolverScheduler.from_config(first.config, schedule="unipc:order=3")
    direct = SolverScheduler.from_config(SOURCES[0].config, schedule="unipc:order=3")
    assert torch.equal(_run(second, x, tools), _run(direct, x, tools))
    assert SolverScheduler.from_config(first.config).config.schedule == "ddim"


def test_the_config_is_json_and_set_timesteps_leaves_it_alone(fixed: SolverSchedule) -> None:
    scheduler = SolverScheduler.from_config(SOURCES[2].config, schedule="unipc:order=3", use_dynamic_shifting=True)
    before = scheduler.to_json_string()
    scheduler.set_timesteps(5, mu=1.3)
    assert scheduler.to_json_string() == before
    assert json.loads(before)["schedule"] == "unipc:order=3"
    embedded = SolverScheduler(schedule=fixed.to_dict())
    assert json.loads(embedded.to_json_string())["schedule"] == embedded.config.schedule


# ---- fixed schedules -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_path", [str, Path])
def test_a_schedule_from_a_file_outlives_it(
    fixed: SolverSchedule, as_path: type, x: Tensor, tools: Any, tmp_path: Path
) -> None:
    file = tmp_path / "found.json"
    fixed.save(file)
    scheduler = SolverScheduler.from_config(SOURCES[0].config, schedule=as_path(file))
    expected = _run(scheduler, x, tools)
    file.unlink()
    scheduler.save_pretrained(tmp_path / "folder")
    again = SolverScheduler.from_pretrained(tmp_path / "folder")
    assert again.source == fixed
    assert torch.equal(_run(again, x, tools), expected)


def test_a_dict_is_the_same_schedule(fixed: SolverSchedule, x: Tensor, tools: Any) -> None:
    by_dict = SolverScheduler.from_config(SOURCES[0].config, schedule=fixed.to_dict())
    by_recipe = SolverScheduler.from_config(SOURCES[0].config, schedule="unipc:order=3,grid=linspace")
    assert by_dict.source == fixed
    assert torch.equal(_run(by_dict, x, tools), _run(by_recipe, x, tools))


def test_a_fixed_schedule_names_both_numbers(fixed: SolverSchedule) -> None:
    scheduler = SolverScheduler(schedule=fixed.to_dict())
    with pytest.raises(ValueError, match=r"found has 5 network evaluations.*num_inference_steps=8"):
        scheduler.set_timesteps(8)
    scheduler.set_timesteps(5)
    assert len(scheduler.timesteps) == 5


def test_a_fixed_schedule_keeps_its_times(fixed: SolverSchedule) -> None:
    """Against the sigmas that flow pipelines pass, and against mu."""
    noise = NoiseSchedule.flow()
    flow = recipe("dpmpp:order=2", noise, 4)
    scheduler = SolverScheduler.from_config(SOURCES[2].config, schedule=flow.to_dict(), use_dynamic_shifting=True)
    scheduler.set_timesteps(4, sigmas=[1.0, 0.9, 0.5, 0.1], mu=2.0)
    assert scheduler.solver_schedule == flow
    with pytest.raises(ValueError, match="4 network evaluations"):
        scheduler.set_timesteps(sigmas=[1.0, 0.5])


def test_a_named_grid_keeps_its_times() -> None:
    scheduler = SolverScheduler.from_config(SOURCES[2].config, schedule="euler:grid=trailing")
    scheduler.set_timesteps(4)
    own = scheduler.timesteps
    scheduler.set_timesteps(sigmas=[1.0, 0.9, 0.5, 0.1])
    assert torch.equal(scheduler.timesteps, own)
    open_grid = SolverScheduler.from_config(SOURCES[2].config, schedule="euler")
    open_grid.set_timesteps(sigmas=[1.0, 0.9, 0.5, 0.1])
    assert not torch.equal(open_grid.timesteps, own)


def test_a_schedule_of_another_family(fixed: SolverSchedule) -> None:
    scheduler = SolverScheduler.from_config(SOURCES[2].config, schedule=fixed.to_dict())
    with_path = recipe("ddim", NoiseSchedule.vp_linear(), 5).to_dict()
    assert scheduler.source == fixed  # nothing in it says which family its times belong to
    with pytest.raises(ValueError, match="belong to 'vp_linear', not to the 'flow'"):
        SolverScheduler.from_config(SOURCES[2].config, schedule=with_path).set_timesteps(5)


# ---- names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_no_alias_takes_a_recipes_name(name: str) -> None:
    parsed = parse_recipe(name)
    assert parsed.recipe.name == name
    assert parsed.options == parsed.recipe.defaults
    assert pickle.loads(pickle.dumps(parsed)) == parsed


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("unipcc:order=3", "unknown schedule 'unipcc:order=3'.*unipc"),
        ("no/such/file.json", "unknown schedule 'no/such/file.json'"),
        ("unipc:ordr=3", "no option 'ordr'; known: order"),
        ("unipc:order=9", r"order must be 1\.\.4, got 9"),
        ("unipc:order=three", "order='three' should be a whole number"),
        ("unipc:order", "'order' is not of the form key=value"),
        ("ddim:grid=lambada", "unknown grid 'lambada'; known: linspace"),
    ],
)
def test_schedules_that_are_none(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SolverScheduler.from_config(SOURCES[0].config, schedule=text)


def test_malformed_files(fixed: SolverSchedule, tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json: not JSON"):
        SolverScheduler(schedule=str(broken))
    broken.write_text(json.dumps({**fixed.to_dict(), "colour": "blue"}))
    with pytest.raises(ValueError, match="colour"):
        SolverScheduler(schedule=str(broken))
    with pytest.raises(ValueError, match="format is None"):
        SolverScheduler(schedule={"times": [1.0, 0.0], "steps": [{}]})


def test_the_datas_mean(tmp_path: Path, x: Tensor, tools: Any) -> None:
    save_file({"mean": torch.zeros(3, 4, 4)}, tmp_path / "small.safetensors")
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "two.safetensors")
    text = "ddim:afs=average_x0"
    with pytest.raises(ValueError, match="expected one tensor, the data's mean, found a, b"):
        SolverScheduler(schedule=text, first_x0=str(tmp_path / "two.safetensors"))
    with pytest.raises(ValueError, match="needs first_x0"):
        SolverScheduler(schedule=text).set_timesteps(4)
    with pytest.raises(ValueError, match=r"first_x0 has shape \(3, 4, 4\), the state \(3, 8, 8\)"):
        _run(SolverScheduler(schedule=text, first_x0=str(tmp_path / "small.safetensors")), x, tools)


def test_analytic_first_steps_of_flow_models_need_swap() -> None:
    with pytest.raises(ValueError, match=r"samplers\.schedulers\.swap"):
        SolverScheduler.from_config(SOURCES[2].config, schedule="euler:afs=zero_x0")

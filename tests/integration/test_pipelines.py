"""The swap, in unmodified pipelines: counted evaluations, determinism, saving, restoring."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines.harness import relative

from samplers import SolverSchedule, recipe
from samplers.schedulers import SolverScheduler, swap

PIPELINES = ("sd", "sdxl", "dit", "ddpm", "sd3", "flux")
RECIPES = ["ddim", "dpmpp:order=2", "unipc:order=3", "deis:order=2"]
every_pipeline = pytest.mark.parametrize("name", PIPELINES)


def _swapped(tiny: Any, schedule: Any, **options: Any) -> Any:
    tiny.pipe.scheduler = SolverScheduler.from_config(tiny.pipe.scheduler.config, schedule=schedule, **options)
    return tiny


@every_pipeline
@pytest.mark.parametrize("recipe", RECIPES)
def test_evaluations_are_counted_and_runs_repeat(name: str, recipe: str, build: Callable[[str], Any]) -> None:
    tiny = _swapped(build(name), recipe)
    with tiny.counting() as batches:
        out = tiny(5)
    assert batches == [tiny.rows] * 5
    assert out.isfinite().all()
    assert torch.equal(tiny(5), out)
    assert not torch.equal(tiny(5, seed=8), out)
    assert not torch.equal(tiny(6), out)


@every_pipeline
@pytest.mark.parametrize("recipe", ["ddim", "unipc:order=3"])
def test_swap_is_from_config_for_a_while(name: str, recipe: str, build: Callable[[str], Any]) -> None:
    tiny = build(name)
    old, before = tiny.pipe.scheduler, tiny(4)
    with swap(tiny.pipe, recipe) as scheduler:
        assert tiny.pipe.scheduler is scheduler
        inside = tiny(4)
    assert tiny.pipe.scheduler is old
    assert torch.equal(tiny(4), before)
    assert torch.equal(_swapped(tiny, recipe)(4), inside)


@every_pipeline
@pytest.mark.parametrize("recipe", ["dpmpp:order=2", "dpmpp:afs=zero_x0"])
def test_swap_restores_after_an_error(name: str, recipe: str, build: Callable[[str], Any]) -> None:
    tiny = build(name)
    old, before = tiny.pipe.scheduler, tiny(3)
    with pytest.raises(RuntimeError, match="on purpose"), swap(tiny.pipe, recipe), tiny.failing_at(1):
        tiny(3)
    assert tiny.pipe.scheduler is old
    assert not tiny.denoiser._forward_pre_hooks
    assert torch.equal(tiny(3), before)


# ---- saving ------------------------------------------------------------------------------------------------------


@every_pipeline
def test_saved_and_reloaded(name: str, build: Callable[[str], Any], tmp_path: Path) -> None:
    tiny = _swapped(build(name), "unipc:order=3,grid=trailing")
    expected = tiny(4)
    tiny.pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["samplers.schedulers", "SolverScheduler"]
    tiny.pipe = type(tiny.pipe).from_pretrained(tmp_path, **dict.fromkeys(tiny.absent))
    tiny.pipe.set_progress_bar_config(disable=True)
    assert isinstance(tiny.pipe.scheduler, SolverScheduler)
    assert torch.equal(tiny(4), expected)


# ---- fixed schedules ---------------------------------------------------------------------------------------------


@every_pipeline
@pytest.mark.parametrize("form", ["path", "dict", "object"])
def test_fixed_schedules(name: str, form: str, build: Callable[[str], Any], tmp_path: Path) -> None:
    """In every form that swap takes; another number of steps is refused before the network is called."""
    tiny = build(name)
    noise = SolverScheduler.from_config(tiny.pipe.scheduler.config).noise_schedule
    found = recipe("unipc:order=3,grid=trailing", noise, 4)
    found.save(tmp_path / "found.json")
    schedule: Any = {"path": tmp_path / "found.json", "dict": found.to_dict(), "object": found}[form]
    with swap(tiny.pipe, schedule):
        out = tiny(4)
        with tiny.counting() as batches, pytest.raises(ValueError, match=r"4 network evaluations; num_inference_steps=6"):
            tiny(6)
    assert batches == []
    with swap(tiny.pipe, "unipc:order=3,grid=trailing"):
        assert relative(out, tiny(4)) < (1e-6 if name != "flux" else 1.0)  # mu moves the recipe's grid, not the schedule's


def test_unknown_schedules_leave_the_pipeline_alone(build: Callable[[str], Any]) -> None:
    tiny = build("sd")
    old = tiny.pipe.scheduler
    with pytest.raises(ValueError, match="unknown schedule 'unipcc'"), swap(tiny.pipe, "unipcc"):
        pass
    assert tiny.pipe.scheduler is old


def test_loaded_schedules_are_data(build: Callable[[str], Any]) -> None:
    """A schedule straight from a dict, without times of ours, drives a pipeline."""
    schedule = SolverSchedule.from_dict(
        {
            "format": "solver-schedule/1",
            "defaults": {"order": 1},
            "times": [1.0, 0.7, 0.4, 0.1, 0.0],
            "steps": [{}, {"order": 2}, {"order": 2, "pred": "eps"}, {}],
        }
    )
    tiny = _swapped(build("sd"), schedule.to_dict())
    assert tiny(4).isfinite().all()
    assert tiny.pipe.scheduler.timesteps.tolist() == [999.0, 699.0, 399.0, 99.0]

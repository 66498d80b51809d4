"""Swapping a pipeline's scheduler for a while, with what an analytic first step needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from ..strategy import SolverSchedule
from .solver_scheduler import SolverScheduler

OWN_FOLDER = "fewstep_scheduler"
_FALLBACKS = {"vp": DPMSolverMultistepScheduler, "edm": EDMEulerScheduler, "flow": FlowMatchEulerDiscreteScheduler}
_INPUTS = ("hidden_states", "sample")  # the state's name among a denoiser's keyword arguments


@contextmanager
def swap(
    pipe: DiffusionPipeline, schedule: str | Path | Mapping[str, Any] | SolverSchedule, **options: Any
) -> Iterator[SolverScheduler]:
    """Run ``pipe`` with a solver schedule inside the block; the old scheduler is back afterwards, errors included.

    Args:
        pipe: any pipeline with a ``scheduler`` and a ``unet`` or ``transformer``.
        schedule: recipe text, path or name of a JSON schedule, its dict, or a `SolverSchedule`.
        options: passed to `SolverScheduler.from_config`.

    Raises:
        ValueError: see `SolverScheduler.from_config`; also an analytic first step in a pipeline without a known denoiser.
    """
    if isinstance(schedule, SolverSchedule):
        schedule = schedule.to_dict()
    old = pipe.scheduler
    scheduler = SolverScheduler.from_config(old.config, schedule=schedule, _opened_by_hook=True, **options)
    hook = _open_first_input(pipe, scheduler) if scheduler.analytic_first_step else None
    pipe.scheduler = scheduler
    try:
        yield scheduler
    finally:
        pipe.scheduler = old
        if hook is not None:
            hook.remove()


def export(pipe: DiffusionPipeline, path: str | Path) -> Path:
    """Save ``pipe`` so that it loads without fewstep, and our scheduler beside it.

    The folder's own scheduler is one of diffusers' for the same model; ``fewstep_scheduler`` holds ours, for
    ``SolverScheduler.from_pretrained(path, subfolder="fewstep_scheduler")``. ``pipe`` is not changed.

    Args:
        pipe: a pipeline whose scheduler is a `SolverScheduler`.
        path: folder to write.

    Returns:
        The folder.

    Raises:
        ValueError: the pipeline has another scheduler, or ``path`` is a file.
    """
    ours, path = pipe.scheduler, Path(path)
    if not isinstance(ours, SolverScheduler):
        raise ValueError(
            f"export needs a pipeline with a SolverScheduler; this one has {type(ours).__name__}: use save_pretrained"
        )
    if path.is_file():
        raise ValueError(f"{path} is a file; export writes a folder")
    try:
        pipe.scheduler = _FALLBACKS[ours.model_config.family].from_config(ours.config)
        pipe.save_pretrained(path)
    finally:
        pipe.scheduler = ours
    ours.save_pretrained(path / OWN_FOLDER)
    return path


def _open_first_input(pipe: DiffusionPipeline, scheduler: SolverScheduler) -> Any:
    """Apply the analytic first step to the denoiser's first input of a run, unless the pipeline did so itself."""
    denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    if not isinstance(denoiser, torch.nn.Module):
        raise ValueError(f"{type(pipe).__name__} has no unet or transformer to apply the analytic first step to")

    def before(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        due = scheduler.tableau is not None and scheduler.step_index is None and not scheduler.opened
        if not due or scheduler.begin_index not in (None, 0):
            return None
        if scheduler.begin_index is None and _is_later(scheduler, kwargs.get("timestep", args[1] if len(args) > 1 else None)):
            return None  # a noisy video or image, in a pipeline that does not say where it begins (Wan video-to-video)
        if args:
            return (_opened(args[0]), *args[1:]), kwargs
        name = next((key for key in _INPUTS if key in kwargs), None)
        if name is None:
            raise ValueError(f"cannot find the state among the inputs of {type(module).__name__}: {', '.join(kwargs)}")
        return args, {**kwargs, name: _opened(kwargs[name])}

    def _opened(sample: Tensor) -> Tensor:
        return scheduler.open(sample)

    return denoiser.register_forward_pre_hook(before, with_kwargs=True)


def _is_later(scheduler: SolverScheduler, timestep: Any) -> bool:
    """Whether the denoiser's timestep is one of the schedule's, but not the first; pipelines may have rescaled it."""
    if not torch.is_tensor(timestep) or not timestep.is_floating_point() or timestep.numel() == 0:
        return False
    value = timestep.max().to(scheduler.timesteps)
    return bool(value != scheduler.timesteps[0]) and bool((value == scheduler.timesteps[1:]).any())

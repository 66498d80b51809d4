"""Swapping a pipeline's scheduler for a while, with what an analytic first step needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import nn

from ..strategy import SolverSchedule
from .opening import is_later, open_input
from .solver_scheduler import SolverScheduler

OWN_FOLDER = "fewstep_scheduler"
_FALLBACKS = {"vp": DPMSolverMultistepScheduler, "edm": EDMEulerScheduler, "flow": FlowMatchEulerDiscreteScheduler}

_DENOISERS = ("unet", "transformer", "transformer_2")  # Wan 2.2 has two; the first that is called opens the run
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
    scheduler = SolverScheduler.from_config(old.config, schedule=schedule, _hooked=True, **options)
    hooks = _open_first_inputs(pipe) if scheduler.analytic_first_step else []
    pipe.scheduler = scheduler
    try:
        yield scheduler
    finally:
        pipe.scheduler = old
        for hook in hooks:
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


def _open_first_inputs(pipe: DiffusionPipeline) -> list[Any]:
    """Apply the analytic first step to the denoiser's first input of every run, unless the pipeline did so itself.

    Returns:
        The handles of the hooks that do so, to be removed.

    Raises:
        ValueError: the pipeline has no known denoiser.
    """
    denoisers = [module for name in _DENOISERS if isinstance(module := getattr(pipe, name, None), nn.Module)]
    if not denoisers:
        raise ValueError(f"{type(pipe).__name__} has no unet or transformer to apply the analytic first step to")

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        scheduler = pipe.scheduler  # perhaps no longer the one that was put there: callbacks may exchange it
        if not isinstance(scheduler, SolverScheduler) or not scheduler.analytic_first_step:
            return None
        due = scheduler.tableau is not None and scheduler.step_index is None and not scheduler.opened
        if not due or scheduler.begin_index not in (None, 0):
            return None
        timestep = kwargs.get("timestep", args[1] if len(args) > 1 else None)
        if scheduler.begin_index is None and is_later(timestep, scheduler.timesteps):
            return None  # a noisy video or image, in a pipeline that does not say where it begins (Wan video-to-video)
        if args:
            whole, scheduler.opened_sizes = open_input(scheduler.open, module, args[0], timestep)
            return (whole, *args[1:]), kwargs
        name = next((key for key in _INPUTS if key in kwargs), None)
        if name is None:
            raise ValueError(f"cannot find the state among the inputs of {type(module).__name__}: {', '.join(kwargs)}")
        whole, scheduler.opened_sizes = open_input(scheduler.open, module, kwargs[name], timestep)
        return args, {**kwargs, name: whole}

    before.opens_first_input = True  # type: ignore[attr-defined]
    fresh = [denoiser for denoiser in denoisers if not _has_opener(denoiser)]
    return [denoiser.register_forward_pre_hook(before, with_kwargs=True) for denoiser in fresh]


def _has_opener(denoiser: nn.Module) -> bool:
    """Whether an enclosing `swap` has hooked it already: its hook serves the scheduler that is in place, whichever it is."""
    return any(hasattr(hook, "opens_first_input") for hook in denoiser._forward_pre_hooks.values())

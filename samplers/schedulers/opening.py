"""The analytic first step in pipelines that do not call ``scale_model_input``: applied to the network's first input.

What the network gets is not always the state alone. Image-to-video models carry the image as further channels, or as a clean
first frame whose tokens are at time 0; both must stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn


def check_opened(sizes: Set[int], sample: Tensor) -> None:
    """Whether what a hook opened in the network's input, in values per sample, can be the state (B, *E) of the first step.

    Raises:
        RuntimeError: it was nothing, or something of another size.
    """
    if not sizes:
        raise RuntimeError(
            "this pipeline did not call scale_model_input, so the analytic first step never reached the network; use "
            "`with samplers.schedulers.swap(pipe, schedule): ...`"
        )
    if (size := math.prod(sample.shape[1:])) not in sizes:
        raise RuntimeError(
            f"the analytic first step was applied to {max(sizes)} values per sample of the network's input, but the state has "
            f"{size}: this pipeline shows the network more than the state; choose a schedule without an analytic first step"
        )


def open_input(
    apply: Callable[[Tensor], Tensor], module: nn.Module, given: Tensor, timestep: Any
) -> tuple[Tensor, frozenset[int]]:
    """Apply an analytic first step to the state in a denoiser's input.

    Args:
        apply: the step; (B, *E) to the same.
        module: the denoiser; its config says how many channels it takes and returns.
        given: its input: the state, possibly with conditions.
        timestep: its timestep; (B, N) where tokens have times of their own.

    Returns:
        The input with the state opened, and the sizes that the state may have by this, in values per sample.

    Raises:
        ValueError: tokens with times that cannot be placed in the state.
    """
    state, conditions = _without_conditions(module, given)
    opened = apply(state)
    sizes = {math.prod(state.shape[1:])}
    if torch.is_tensor(timestep) and timestep.ndim == 2 and timestep.shape[1] > 1:
        noisy = _noisy_places(module, state, timestep)
        opened = torch.where(noisy, opened, state)
        sizes.add(int(noisy[0].expand_as(state[0]).sum()))
    whole = opened if conditions is None else torch.cat([opened, conditions], dim=_channel_axis(given))
    return whole, frozenset(sizes)


def _channel_axis(given: Tensor) -> int:
    return -1 if given.ndim == 3 else 1  # tokens are (B, N, C)


def _without_conditions(module: nn.Module, given: Tensor) -> tuple[Tensor, Tensor | None]:
    """The state, and the channels that follow it where the network takes more than it returns."""
    config: Mapping[str, Any] = getattr(module, "config", {})
    taken, returned, axis = config.get("in_channels"), config.get("out_channels"), _channel_axis(given)
    if not (isinstance(taken, int) and isinstance(returned, int) and returned < taken == given.shape[axis]):
        return given, None
    state, conditions = given.split([returned, taken - returned], dim=axis)
    return state, conditions


def _noisy_places(module: nn.Module, state: Tensor, timestep: Tensor) -> Tensor:
    """Where tokens with times of their own, (B, N), are noise: at the latest time. Broadcasts to ``state``."""
    noisy = timestep == timestep.amax(dim=1, keepdim=True)
    if state.ndim == 3 and noisy.shape[1] == state.shape[1]:
        return noisy[..., None]
    patch = getattr(module, "config", {}).get("patch_size")
    if state.ndim == 5 and isinstance(patch, list | tuple) and len(patch) == 3:
        grid = [size // step for size, step in zip(state.shape[2:], patch, strict=True)]
        if noisy.shape[1] == grid[0] * grid[1] * grid[2]:
            places = noisy.reshape(-1, 1, *grid)
            for axis, step in enumerate(patch, start=2):
                places = places.repeat_interleave(step, dim=axis)
            return places
    raise ValueError(
        f"{type(module).__name__} was given {noisy.shape[1]} times for a state of shape {tuple(state.shape)}: cannot tell "
        "which part is noise, so an analytic first step is not possible here; choose a schedule without one"
    )


def is_later(timestep: Any, timesteps: Tensor) -> bool:
    """Whether the denoiser's timestep is one of the schedule's, but not the first; pipelines may have rescaled it."""
    if not torch.is_tensor(timestep) or not timestep.is_floating_point() or timestep.numel() == 0:
        return False
    value = timestep.max().to(timesteps)
    return bool(value != timesteps[0]) and bool((value == timesteps[1:]).any())

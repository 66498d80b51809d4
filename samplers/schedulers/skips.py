"""Scaling a U-Net's skip connections: an edit of the network, which is why it is no part of a solver schedule.

Published schedules of the unified sampling framework (arXiv:2312.07243) may come with such factors; their results are those of
an edited model and are reported apart from pure solver results.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn

Factors = float | Sequence[float] | Sequence[Sequence[float]]


@dataclass
class SkipScaling:
    """A running edit.

    Attributes:
        factors: per network call (one row: the same for all) the factor of every skip connection, encoder order.
        calls: network calls since the start or the last `reset`.
    """

    factors: tuple[tuple[float, ...], ...]
    calls: int = 0

    @property
    def current(self) -> tuple[float, ...]:
        """The factors of the call that is running; after the last row the first one comes again, for the next image."""
        return self.factors[(self.calls - 1) % len(self.factors)]

    @property
    def identity(self) -> bool:
        """Whether every factor is 1, so that results are pure solver results."""
        return all(factor == 1.0 for row in self.factors for factor in row)

    @property
    def label(self) -> str:
        """For reports: what was done to the network."""
        values = [factor for row in self.factors for factor in row]
        return "network unedited" if self.identity else f"network edited: skips scaled by {min(values):g} to {max(values):g}"

    def reset(self) -> None:
        """Start again at the first row, after a run that was broken off."""
        self.calls = 0


def skip_count(network: Any) -> int:
    """Skip connections of a `UNet2DModel` or `UNet2DConditionModel`, or of a pipeline's ``unet``.

    Raises:
        ValueError: something else.
    """
    return sum(len(block.resnets) for block in _unet(network).up_blocks)


def _unet(network: Any) -> Any:
    unet = network if isinstance(network, nn.Module) else getattr(network, "unet", None)
    if not isinstance(unet, UNet2DModel | UNet2DConditionModel):
        raise ValueError(f"skip scaling needs a UNet2DModel or UNet2DConditionModel, got {type(unet or network).__name__}")
    return unet


@contextmanager
def scaled_skips(network: Any, factors: Factors) -> Iterator[SkipScaling]:
    """Multiply the skip connections of a U-Net inside the block; afterwards it is bit for bit the old network.

    Args:
        network: a `UNet2DModel` or `UNet2DConditionModel`, or a pipeline with one.
        factors: one number for all connections; or one per connection, in the encoder's order (its input convolution first);
            or a row of those per network call of a run, so that they change from step to step.

    Yields:
        The running edit, which counts calls and names itself for reports.

    Raises:
        ValueError: another kind of network, or factors that do not fit its connections.
    """
    unet = _unet(network)
    run = SkipScaling(_rows(factors, skip_count(unet)))

    def count(module: nn.Module, args: tuple[Any, ...]) -> None:
        run.calls += 1

    handles = [unet.register_forward_pre_hook(count)]
    end = skip_count(unet)
    try:
        for block in unet.up_blocks:  # the first one takes the encoder's last outputs
            start = end - len(block.resnets)
            handles.append(block.register_forward_pre_hook(_scale(run, slice(start, end)), with_kwargs=True))
            end = start
        yield run
    finally:
        for handle in handles:
            handle.remove()


def _rows(factors: Factors, count: int) -> tuple[tuple[float, ...], ...]:
    if isinstance(factors, int | float):
        return ((float(factors),) * count,)
    rows: list[list[float]] = []
    for item in factors:
        if isinstance(item, int | float):
            rows = rows or [[]]
            rows[0].append(float(item))
        else:
            rows.append([float(factor) for factor in item])
    if not rows or any(len(row) != count for row in rows):
        raise ValueError(f"this network has {count} skip connections; got rows of {[len(row) for row in rows]} factors")
    return tuple(map(tuple, rows))


def _scale(run: SkipScaling, own: slice) -> Any:
    name, place = "res_hidden_states_tuple", 1

    def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        skips = kwargs[name] if name in kwargs else args[place]
        scaled = tuple(s if f == 1.0 else s * f for s, f in zip(skips, run.current[own], strict=True))
        if name in kwargs:
            return args, {**kwargs, name: scaled}
        return (*args[:place], scaled, *args[place + 1 :]), kwargs

    return before

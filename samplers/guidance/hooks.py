"""Guidance inside an unmodified diffusers pipeline: the denoiser's ``forward`` is wrapped, and unwrapped afterwards.

The wrapper sees what the network sees: the state, the timestep, the conditioning. Its shift of the x0-prediction is written
into the network's own output, so every solver, guidance rule and callback downstream works with one consistent prediction.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..config_reader import read_config
from ..denoisers import network_of
from ..parametrization import to_x0, x0_coefficients
from .clock import Clock
from .shifts import finite_rows

_STATE_NAMES = ("sample", "hidden_states")


@dataclass
class GuidanceRun:
    """What guidance did inside its block.

    Attributes:
        evaluations: network calls of the pipeline.
        guided: those that were guided.
        extra_evaluations: network calls that guidance added.
    """

    evaluations: int = 0
    guided: int = 0
    extra_evaluations: int = 0
    _dropped: Tensor | None = field(default=None, repr=False)

    @property
    def dropped(self) -> int:
        """Samples whose shift was not finite and was left out, over all evaluations."""
        return 0 if self._dropped is None else int(self._dropped)

    def drop(self, count: Tensor) -> None:
        """Count samples without waiting for the device."""
        self._dropped = count if self._dropped is None else self._dropped + count


@dataclass(frozen=True)
class NetworkInputs:
    """A forward pass's arguments, with the state and the timestep found among them.

    Attributes:
        state: as given: scaled, in the network's dtype.
        timestep: as given.
        others: further positional arguments.
        named: further keyword arguments.
        state_name: the state's keyword, or None when it is positional.
        positional_time: whether the timestep is.
    """

    state: Tensor
    timestep: Any
    others: tuple[Any, ...]
    named: dict[str, Any]
    state_name: str | None
    positional_time: bool

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NetworkInputs:
        """Find them.

        Raises:
            ValueError: no known name for the state, or no timestep.
        """
        named = dict(kwargs)
        name = None if args else next((key for key in _STATE_NAMES if key in named), None)
        positional_time = len(args) > 1
        if (not args and name is None) or (not positional_time and "timestep" not in named):
            raise ValueError(f"cannot find the state and the timestep among the network's arguments: {', '.join(kwargs)}")
        state = args[0] if args else named.pop(name)
        timestep = args[1] if positional_time else named.pop("timestep")
        return cls(state, timestep, args[2:], named, name, positional_time)

    def call(self, network: Callable[..., Any], **changes: Any) -> Any:
        """Evaluate ``network``, with other keyword arguments where given."""
        named = {**self.named, **changes}
        others = self.others
        if torch.is_grad_enabled():
            named, others = _plain(named), _plain(others)
        leading = [] if self.state_name else [self.state]
        if self.state_name:
            named[self.state_name] = self.state
        if self.positional_time:
            leading.append(self.timestep)
        else:
            named["timestep"] = self.timestep
        return network(*leading, *others, **named)


@dataclass
class NetworkCall:
    """One evaluation of the network, as the pipeline makes it.

    Attributes:
        state: (R, C, ...) the noisy state in the frame of ``alpha`` and ``sigma``, at least float32.
        alpha: signal level.
        sigma: noise level.
        end: (alpha, sigma) where the step that follows ends.
        index: place among the scheduler's timesteps.
        first: whether it is the first of a run.
        copies: how often the same states stand along the batch (2 with classifier-free guidance).
        inputs: the network's arguments.
        clock: times and levels.
        network: the network's own forward.
        run: counts.
        kept: the network's output at the call's own state and time once it is known; the pipeline is given this one.
    """

    state: Tensor
    alpha: float
    sigma: float
    end: tuple[float, float]
    index: int
    first: bool
    copies: int
    inputs: NetworkInputs
    clock: Clock
    network: Callable[..., Any]
    run: GuidanceRun
    kept: Any = None

    def answer(self, state: Tensor, t: Tensor | None = None, **changes: Any) -> Tensor:
        """The network's x0-prediction (R, C, ...) at ``state`` and time t, keeping graphs; at the call's own time when None."""
        clock, inputs = self.clock, self.inputs
        alpha, sigma = (self.alpha, self.sigma) if t is None else clock.levels_at(t)
        scaled = (state * clock.input_scale(sigma)).to(inputs.state.dtype)
        if scaled.shape[1] < inputs.state.shape[1]:
            scaled = torch.cat([scaled, _plain(inputs.state[:, scaled.shape[1] :])], dim=1)
        told = inputs.timestep if t is None else clock.told(t, inputs.timestep)
        output = replace(inputs, state=scaled, timestep=told).call(self.network, **changes)
        self.run.extra_evaluations += t is not None
        if t is None:
            self.kept = output
        prediction = _tensor(output)[:, : state.shape[1]].to(state.dtype)
        return to_x0(prediction, state, alpha, sigma, clock.model.prediction_type, clock.model.sigma_data)


Shift = Callable[[NetworkCall], Tensor | None]  # the x0-shift (R, C, ...), or None for an unguided evaluation


@contextmanager
def guided_network(pipe: Any, shift: Shift, run: GuidanceRun) -> Iterator[None]:
    """Add ``shift`` to the x0-prediction of every network call of ``pipe`` inside the block.

    Afterwards, errors included, the network is what it was: nothing of it is replaced but its ``forward``.

    Args:
        pipe: a pipeline with a scheduler of a supported family and a ``unet`` or ``transformer``.
        shift: see `Shift`.
        run: counts.

    Raises:
        ValueError: no such network, or an unsupported scheduler.
    """
    network = network_of(pipe)
    read_config(pipe.scheduler.config)  # refused before any compute
    original, clock, copies = network.forward, Clock(), [1]
    channels = getattr(getattr(network, "config", None), "out_channels", None)
    busy = False

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal busy
        if busy:
            return original(*args, **kwargs)
        busy = True
        try:
            inputs = NetworkInputs.of(args, kwargs)
            first = clock.look(pipe.scheduler, inputs.timestep)
            if first:
                copies[0] = _copies(pipe, inputs.state)
            return _guided(_call(inputs, clock, first, copies[0], original, run, channels), shift, args, kwargs)
        finally:
            busy = False

    with patched_forward(network, functools.wraps(original)(forward)):
        yield


@contextmanager
def patched_forward(network: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace ``network.forward`` inside the block; afterwards the module's own is back, be it the class's or a wrapper's."""
    own, original = "forward" in vars(network), network.forward
    network.forward = forward
    try:
        yield
    finally:
        if own:
            network.forward = original
        else:
            del network.forward


def _call(
    inputs: NetworkInputs,
    clock: Clock,
    first: bool,
    copies: int,
    network: Callable[..., Any],
    run: GuidanceRun,
    channels: int | None,
) -> NetworkCall:
    alpha, sigma = clock.levels(clock.index)
    wide = torch.promote_types(inputs.state.dtype, torch.float32)
    state = inputs.state.detach().to(wide) / clock.input_scale(sigma)
    if channels is not None and state.ndim == 4 and channels < state.shape[1]:
        state = state[:, :channels]  # inpainting networks are given more than the state, which comes first
    end = clock.levels(clock.index + 1)
    return NetworkCall(state, alpha, sigma, end, clock.index, first, copies, inputs, clock, network, run)


def _guided(call: NetworkCall, shift: Shift, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    call.run.evaluations += 1
    delta = shift(call)
    output = call.network(*args, **kwargs) if call.kept is None else call.kept
    if delta is None:
        return output
    call.run.guided += 1
    model = call.clock.model
    _, c_o = x0_coefficients(model.prediction_type, call.alpha, call.sigma, model.sigma_data)
    delta, bad = finite_rows(delta)
    call.run.drop(bad)
    return _shifted(output, delta / c_o)


def _copies(pipe: Any, x: Tensor) -> int:
    """2 when the batch is two halves of the same states, as classifier-free guidance makes it."""
    if getattr(pipe, "do_classifier_free_guidance", True) and len(x) % 2 == 0:
        first, second = x.chunk(2)
        return 2 if torch.equal(first, second) else 1
    return 1


def _plain(value: Any) -> Any:
    """The same values without inference tensors, which no graph may hold."""
    if torch.is_tensor(value):
        return value.clone() if value.is_inference() else value
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(item) for item in value)
    return value


def _tensor(output: Any) -> Tensor:
    return output if torch.is_tensor(output) else output[0]


def _shifted(output: Any, delta: Tensor) -> Any:
    """The network's output with ``delta`` added to its first channels, in the form it came in."""
    answer = _tensor(output).detach()
    channels = delta.shape[1]
    moved = (answer[:, :channels].to(delta.dtype) + delta).to(answer.dtype)
    if answer.shape[1] > channels:
        moved = torch.cat([moved, answer[:, channels:]], dim=1)
    if torch.is_tensor(output):
        return moved
    if isinstance(output, tuple):
        return (moved, *output[1:])
    values = dict(output)
    values[next(iter(values))] = moved
    return type(output)(**values)

"""A smooth nonlinear network, the loop of a pipeline, and the comparison of two schedulers in it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler, SchedulerMixin
from diffusers.utils import logging
from torch import Tensor

from samplers.schedulers import SolverScheduler


def dummy_model(x: Tensor, t: Tensor | float) -> Tensor:
    """A stand-in for a network, smooth in the state and in the time (one value, or one per sample)."""
    t = torch.as_tensor(t).to(x).reshape(-1, *[1] * (x.ndim - 1)) if x.ndim else torch.as_tensor(t)
    return torch.tanh(x * (0.7 + 0.0003 * t)) * 0.9 + 0.1 * torch.sin(3 * x) + 0.05 * torch.cos(t / 90)


def timeless_model(x: Tensor, t: Tensor | float) -> Tensor:
    """The same without the time: for schedulers whose rounded timesteps are not the times of their sigmas."""
    return dummy_model(x, 400.0)


def loop(scheduler: SchedulerMixin, x: Tensor, model: Callable[..., Tensor] = dummy_model) -> Tensor:
    """What a pipeline does after ``set_timesteps``."""
    for t in scheduler.timesteps:
        model_input = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(model(model_input, t), t, x, return_dict=False)[0]
    return x


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def pytest_make_parametrize_id(val: object) -> str | None:
    """Short names for scheduler classes and their options."""
    if isinstance(val, type):
        return val.__name__.removesuffix("Scheduler")
    if isinstance(val, dict):
        short = {key: "..." if isinstance(value, list) else value for key, value in val.items()}
        return ",".join(f"{key}={value}" for key, value in short.items()) or "defaults"
    return None


class Tools:
    """The functions above, and the comparison; ``limit`` is its relative tolerance."""

    limit = 1e-5
    model = staticmethod(dummy_model)
    timeless = staticmethod(timeless_model)
    loop = staticmethod(loop)
    relative = staticmethod(relative)

    def start(self, scheduler: SchedulerMixin, x: Tensor) -> Tensor:
        """The noise ``x`` in the state's scaling of ``scheduler``.

        EulerDiscrete's state is x_t / alpha; its own start sigma x is of another noise level than sqrt(sigma^2 + 1) x.
        """
        if isinstance(scheduler, EulerDiscreteScheduler):
            return x * (scheduler.sigmas[0] ** 2 + 1) ** 0.5
        return x * getattr(scheduler, "init_noise_sigma", 1.0)

    def result(self, scheduler: SchedulerMixin, x: Tensor, timeless: bool = False) -> Tensor:
        """The result of a run from the noise ``x``, in the model's own scaling."""
        out = loop(scheduler, self.start(scheduler, x), timeless_model if timeless else dummy_model)
        if isinstance(scheduler, EulerDiscreteScheduler):
            out = out / (scheduler.sigmas[-1] ** 2 + 1) ** 0.5
        return out

    def difference(self, theirs: SchedulerMixin, ours: SolverScheduler, x: Tensor, timeless: bool = False) -> float:
        """Relative difference of two schedulers' results, both after ``set_timesteps``."""
        expected = self.result(theirs, x, timeless)
        assert expected.isfinite().all(), "the in-tree result is not finite: nothing to compare with"
        return relative(self.result(ours, x, timeless), expected)

    def pair(
        self, cls: type[SchedulerMixin], recipe: str, options: dict[str, Any], steps: int
    ) -> tuple[SchedulerMixin, SolverScheduler]:
        """The in-tree scheduler and ours in its place, both after ``set_timesteps``."""
        theirs = cls(**options)
        ours = SolverScheduler.from_config(theirs.config, schedule=recipe)
        theirs.set_timesteps(steps)
        ours.set_timesteps(steps)
        return theirs, ours

    def agree(
        self,
        cls: type[SchedulerMixin],
        recipe: str,
        options: dict[str, Any],
        steps: int,
        x: Tensor,
        timeless: bool = False,
    ) -> None:
        """The same times, the same sigmas, and the same result of a whole run."""
        theirs, ours = self.pair(cls, recipe, options, steps)
        if not timeless:
            torch.testing.assert_close(ours.timesteps, theirs.timesteps.float(), rtol=0, atol=1e-6)
        if hasattr(theirs, "sigmas"):
            torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=2e-6, atol=0)
            theirs.sigmas = theirs.sigmas.double()  # their third-order weights cancel in float32
        assert self.difference(theirs, ours, x, timeless) < self.limit


@pytest.fixture
def tools() -> Tools:
    return Tools()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def quiet() -> None:
    """In-tree schedulers log what they change about their own configs."""
    logging.set_verbosity_error()

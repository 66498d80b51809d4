"""From a pipeline's timesteps to noise levels, without waiting for the device at every step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..config_reader import ModelConfig, read_config
from ..noise import NoiseSchedule

_TOLERANCE = 0.02  # relative; bfloat16 pipelines round their timesteps to 1/256


class Clock:
    """Which of the scheduler's timesteps an evaluation is at, and its noise levels.

    Attributes:
        index: place of the evaluation among the timesteps.
        unit: what the network's timestep is, in the scheduler's: 1, or 1/1000 in transformers that are told fractions.
        model: the scheduler's config, understood.
        noise: its noise schedule.
    """

    model: ModelConfig
    noise: NoiseSchedule

    def __init__(self) -> None:
        """Nothing is known before the first evaluation."""
        self.index, self.unit = 0, 1.0
        self._scheduler: Any = None
        self._timesteps: Tensor | None = None
        self._values: list[float] = []

    def look(self, scheduler: Any, timestep: Any) -> bool:
        """Find the evaluation's index; True at the first of a run.

        The device is waited for once per run, and at every step of the few in-tree schedulers that do not count theirs.

        Raises:
            ValueError: a timestep that is not the scheduler's.
        """
        if scheduler is not self._scheduler:
            self.model, self._scheduler = read_config(scheduler.config), scheduler
            self.noise = self.model.noise_schedule()
        fresh = scheduler.timesteps is not self._timesteps
        if fresh:
            self._timesteps, self._values = scheduler.timesteps, scheduler.timesteps.tolist()
        done = getattr(scheduler, "step_index", None)
        if done is not None and not fresh:
            self.index = min(int(done), len(self._values) - 1)
            return False
        value = float(timestep.flatten()[0]) if torch.is_tensor(timestep) else float(timestep)
        self.index, self.unit = self._place(value, getattr(scheduler, "begin_index", None))
        return fresh

    def _place(self, value: float, begin: int | None) -> tuple[int, float]:
        units = (1.0, 1e-3) if self.model.family == "flow" else (1.0,)
        gap, _, index, unit = min(
            (abs(value - unit * known) / max(abs(unit * known), unit), i != begin, i, unit)
            for unit in units
            for i, known in enumerate(self._values)
        )
        if gap > _TOLERANCE:
            raise ValueError(
                f"the network is told time {value:.6g}, which is none of the scheduler's timesteps "
                f"({self._values[0]:.6g} ... {self._values[-1]:.6g}): this pipeline rescales or reverses its time"
            )
        return index, unit

    def levels(self, index: int) -> tuple[float, float]:
        """(alpha, sigma) of an entry of the timesteps; past the last one the end, without noise."""
        if index >= len(self._values):
            return 1.0, 0.0
        return self.levels_at(self.noise.clamp(self.noise.t_of_timestep(self._values[index])))

    def levels_at(self, t: Tensor) -> tuple[float, float]:
        """(alpha, sigma) at a time of the noise schedule."""
        alpha, sigma = self.noise.alpha_sigma(t)
        return alpha.item(), sigma.item()

    def input_scale(self, sigma: float) -> float:
        """What the state is multiplied by to become the network's input (EDM preconditioning)."""
        data = self.model.sigma_data
        return 1.0 if data is None else (sigma**2 + data**2) ** -0.5

    def told(self, t: Tensor, like: Any) -> Any:
        """What the network is told at a time of the noise schedule, in the form of ``like``."""
        value = self.noise.timestep(t).item() * self.unit
        if not torch.is_tensor(like):
            return value
        return torch.full_like(like, value, dtype=like.dtype if like.is_floating_point() else torch.float32)

"""Noise for stochastic schedules, drawn as diffusers draws it; and noising of clean samples for training and img2img."""

from __future__ import annotations

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..config_reader import ModelConfig
from ..noise import NoiseSchedule
from ..parametrization import FLOW_PREDICTION, REVERSED_FLOW_PREDICTION


def wide(x: Tensor) -> Tensor:
    """``x`` in the arithmetic's dtype: at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def noise_like(
    x: Tensor,
    generator: torch.Generator | list[torch.Generator] | None = None,
    *,
    seed: int | None = None,
    step: int = 0,
) -> Tensor:
    """Standard normal noise in the shape of ``x`` (B, *E).

    Args:
        x: gives shape, dtype and device.
        generator: one for the batch, or one per image so that an image does not depend on its batch; wins over ``seed``.
        seed: image b's noise depends on (seed, step, b) alone.
        step: index of the step.

    Raises:
        ValueError: a list of generators of another length than the batch.
    """
    if isinstance(generator, list) and len(generator) != len(x):
        raise ValueError(f"{len(generator)} generators in a list for a batch of {len(x)}; pass one per image, or one alone")
    if generator is None and seed is not None:
        generator = [_generator(seed, step, b) for b in range(len(x))]
    return randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)


def _generator(*words: int) -> torch.Generator:
    """A generator whose seed mixes the words (splitmix64's finaliser), so that neighbours are unrelated."""
    state, mask = 0, (1 << 64) - 1
    for word in words:
        state = (state + word + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return torch.Generator().manual_seed(state >> 1)


def levels_like(noise_schedule: NoiseSchedule, x: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma at ``timesteps`` (B,), shaped to broadcast to ``x`` (B, *E)."""
    t = noise_schedule.t_of_timestep(torch.atleast_1d(timesteps).to("cpu", torch.float64))
    shape = (-1, *[1] * (x.ndim - 1))
    return tuple(level.to(x).reshape(shape) for level in noise_schedule.alpha_sigma(t))  # type: ignore[return-value]


class Noising:
    """The forward process under diffusers' names, for a scheduler with a noise schedule."""

    noise_schedule: NoiseSchedule
    model_config: ModelConfig

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noise x0 to ``timesteps`` (B,): alpha x0 + sigma noise, in the dtype of ``original_samples``."""
        alpha, sigma = levels_like(self.noise_schedule, original_samples, timesteps)
        return alpha * original_samples + sigma * noise.to(original_samples)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` in the argument order of flow schedulers."""
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The training target of v-prediction, alpha noise - sigma x0 (flow: noise - x0; reversed flow: x0 - noise)."""
        kind = self.model_config.prediction_type
        if kind in (FLOW_PREDICTION, REVERSED_FLOW_PREDICTION):
            return noise - sample if kind == FLOW_PREDICTION else sample - noise
        alpha, sigma = levels_like(self.noise_schedule, sample, timesteps)
        return alpha * noise - sigma * sample

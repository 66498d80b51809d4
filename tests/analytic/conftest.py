r"""Gaussian data, on which every chain is affine: x = c_0 + c_x x_T + sum_j c_j xi_j, with coefficients to be probed."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from samplers import Engine, NoiseSchedule, SolverSchedule, Tableau
from samplers.denoisers import GaussianMixture
from samplers.engine import Denoiser


class GaussianChain:
    """N(mean, std^2) under a noise schedule; vectors are (c_0, c_x, c_1, ..., c_n)."""

    mean, std = 0.7, 0.4

    def __init__(self) -> None:
        mean, std = (torch.tensor([value], dtype=torch.float64) for value in (self.mean, self.std))
        self.law = GaussianMixture(mean[None], std)

    @staticmethod
    def levels(noise: NoiseSchedule, t: float) -> tuple[float, float, float]:
        """alpha, sigma and lambda."""
        alpha, sigma = (value.item() for value in noise.alpha_sigma(t))
        return alpha, sigma, math.inf if sigma == 0 else math.log(alpha / sigma)

    def denoise(self, noise: NoiseSchedule, t: float, x: np.ndarray) -> np.ndarray:
        """The posterior mean, of a vector."""
        alpha, sigma, _ = self.levels(noise, t)
        out = x * alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2)
        out[0] += self.mean * sigma**2 / (alpha**2 * self.std**2 + sigma**2)
        return out

    def probed(self, schedule: SolverSchedule, noise: NoiseSchedule, denoiser: Denoiser | None = None) -> np.ndarray:
        """The vector of a whole run of the engine: one image each for nothing, for x_T = 1 and for every draw."""
        draws = sum(step.noise is not None or step.eval.source == "none" for step in schedule.steps)
        draws -= int(schedule.times[-1] == 0 and schedule.steps[-1].noise is not None)  # nothing to add at sigma = 0
        calls = 0

        def source(like: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return torch.zeros_like(like).index_fill_(0, torch.tensor(calls + 1), 1.0)

        x = torch.zeros(draws + 2, 1, dtype=torch.float64)
        x[1] = 1.0
        engine, denoiser = Engine(Tableau.build(schedule, noise), x), denoiser or self.law.denoiser(noise)
        while (query := engine.query) is not None:
            engine.tell(denoiser(engine.x, query.t), noise=source)
        assert calls == draws
        out = engine.x[:, 0].numpy()
        return np.concatenate([out[:1], out[1:] - out[0]])

    @staticmethod
    def moments(c: np.ndarray, mean: float, variance: float) -> tuple[float, float]:
        """Mean and variance of the result for x_T of the given ones."""
        return c[0] + c[1] * mean, c[1] ** 2 * variance + float((c[2:] ** 2).sum())

    def marginal(self, noise: NoiseSchedule, t: float) -> tuple[float, float]:
        """Mean and variance of the data noised to t."""
        alpha, sigma, _ = self.levels(noise, t)
        return alpha * self.mean, alpha**2 * self.std**2 + sigma**2


@pytest.fixture(scope="session")
def chain() -> GaussianChain:
    return GaussianChain()

"""How a schedule does on problems whose answer is known: a prior for every model, at the price of no network evaluation.

A step rule that is bad on a Gaussian is seldom good on images. One-dimensional laws with exact denoisers, from a narrow peak
to two modes far apart, are solved by every candidate in one small batch, and the logarithms of its errors tell the predictor
more than the schedule's genes do while trials are few.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from samplers import NoiseSchedule, SolverSchedule, sample

from .converged import teacher

# (m, s): the law is half N(m, s^2), half N(-m, s^2). Data of standard deviation 0.05 to 1.5, as models are trained on.
LAWS = ((0.0, 0.05), (0.0, 0.2), (0.0, 0.5), (0.0, 1.0), (0.3, 0.05), (0.6, 0.1), (0.9, 0.02), (0.9, 0.1), (1.5, 0.2))
POINTS = 24  # starting points of each law, at the middles of equally likely intervals
FLOOR, CEILING = -12.0, 5.0  # of the logarithms


class KnownProblems:
    """Log errors of schedules on `LAWS`.

    Attributes:
        count: of the problems.
    """

    count = len(LAWS)

    def __init__(self, noise_schedule: NoiseSchedule, final_time: float = 0.0) -> None:
        """Solve the problems with many evaluations.

        Args:
            noise_schedule: of the schedules.
            final_time: where they end.
        """
        self.noise = noise_schedule
        mean, std = torch.tensor(LAWS, dtype=torch.float64).repeat_interleave(POINTS, dim=0).unbind(1)
        self.mean, self.variance = mean, std.square()
        levels = (torch.arange(POINTS, dtype=torch.float64) + 0.5) / POINTS
        self.x_T = torch.special.ndtri(levels).repeat(len(LAWS)) * noise_schedule.sigma(noise_schedule.t_max)
        self.solution = teacher(self.denoise, noise_schedule, self.x_T, nfe=200, final_time=final_time).solution
        self._known: dict[str, np.ndarray] = {}

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        """E[x0 | x_t = x], exact."""
        alpha, sigma = self.noise.alpha_sigma(torch.as_tensor(t, dtype=torch.float64))
        spread = alpha**2 * self.variance + sigma**2
        centre = self.mean * torch.tanh(alpha * self.mean * x / spread)
        return centre + alpha * self.variance / spread * (x - alpha * centre)

    def __call__(self, schedules: Sequence[SolverSchedule]) -> np.ndarray:
        """(N, count) log RMSE to the solutions, each schedule solved once."""
        for schedule in schedules:
            if schedule.digest not in self._known:
                self._known[schedule.digest] = self._errors(schedule)
        return np.stack([self._known[schedule.digest] for schedule in schedules])

    def _errors(self, schedule: SolverSchedule) -> np.ndarray:
        with torch.no_grad():
            x = sample(
                self.denoise, self.x_T, schedule, self.noise,
                first_x0=torch.zeros((), dtype=torch.float64), generator=torch.Generator().manual_seed(0),
            )  # fmt: skip
            squares = (x - self.solution).view(len(LAWS), POINTS).square().mean(1)
        return squares.sqrt().log().nan_to_num(CEILING, CEILING, FLOOR).clamp(FLOOR, CEILING).numpy()

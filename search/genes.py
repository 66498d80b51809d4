"""A schedule's continuous numbers as one vector, and the schedule of such a vector."""

from __future__ import annotations

import msgspec
import torch
from torch import Tensor

from samplers import Residual, SolverSchedule

from .space import NARROWEST, SearchSpace


class Genes:
    """A schedule's continuous genes: what a round changes, and what it means.

    The numbers that are changed are logarithms of gaps, which keep times in order, and additions to coefficients. The physical
    numbers are the times' lambdas, one each, and the same additions.
    """

    def __init__(self, schedule: SolverSchedule, space: SearchSpace, coefficients: bool) -> None:
        """Of a member of ``space``; without ``coefficients`` of its times alone."""
        self.schedule, self.space = space.adopt(schedule) if schedule.times[-1] != space.final_time else schedule, space
        logs = torch.from_numpy(space.gaps(self.schedule)).log()
        self.gaps, n = len(logs), len(self.schedule.steps)
        # The last step to sigma = 0 returns x0-predictions alone: states carry noise there.
        frozen = n - 1 if space.final_time == 0.0 else n
        self.widths: list[int] = []  # of every step's additions: to the latest state, then to the x0-predictions
        values = [logs]
        for i, step in enumerate(self.schedule.steps if coefficients else ()):
            old = step.delta or Residual()
            own = [*_padded(old.x, i + 1)[i:], *_padded(old.x0, i + 1)][1 if i == frozen else 0 :]
            self.widths.append(len(own))
            values.append(torch.tensor(own, dtype=torch.float64))
        self.start = torch.cat(values)

    def physical(self, numbers: Tensor) -> Tensor:
        """(P,) numbers to (P - 1,) lambdas of the inner times, and additions."""
        logs = numbers[: self.gaps]
        shares = torch.softmax(logs, 0) * (1 - NARROWEST * len(logs)) + NARROWEST
        low, high = self.space.lambda_range
        return torch.cat([low + (high - low) * shares.cumsum(0)[:-1], numbers[self.gaps :]])

    def schedule_of(self, physical: Tensor) -> SolverSchedule:
        """The schedule with 0-d tensors in place of numbers, so that its tableau has the same structure for all of them."""
        inner = self.gaps - 1
        times = (self.schedule.times[0], *self.space.noise_schedule.t_of_lam(physical[:inner]), self.schedule.times[-1])
        steps = list(self.schedule.steps)
        for i, own in enumerate(physical[inner:].split(self.widths) if self.widths else ()):
            before = _padded((steps[i].delta or Residual()).x, i + 1)[:i]
            x = (*before, own[0]) if len(own) == i + 2 else ()
            steps[i] = msgspec.structs.replace(steps[i], delta=Residual(x=x, x0=tuple(own[-i - 1 :])))
        return msgspec.structs.replace(self.schedule, times=times, steps=tuple(steps))

    def plain(self, numbers: Tensor) -> SolverSchedule:
        """The schedule with the numbers as they are now, rounded to nine digits."""
        symbolic = self.schedule_of(self.physical(numbers))
        times = (symbolic.times[0], *map(_number, symbolic.times[1:-1]), symbolic.times[-1])
        steps = list(symbolic.steps)
        for i in range(len(self.widths)):
            delta = steps[i].delta
            assert delta is not None
            rounded = Residual(x=tuple(map(_number, delta.x)), x0=tuple(map(_number, delta.x0)))
            steps[i] = msgspec.structs.replace(steps[i], delta=rounded)
        return msgspec.structs.replace(symbolic, times=times, steps=tuple(steps))


def _padded(values: tuple[float, ...], n: int) -> list[float]:
    return [*values, *[0.0] * (n - len(values))]


def _number(value: Tensor | float) -> float:
    return float(f"{float(value):.9g}")

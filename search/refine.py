"""After the search over kinds of steps, its numbers: times and coefficients by gradients through the sampler.

The tableau is differentiable in times and coefficients, so the error to the converged solution is too. This is how S4S
(arXiv:2502.17423), generalised solvers (GS) and LD3 (arXiv:2405.15506) find their coefficients; here it starts from a searched
schedule, and its steps' additions stay a readable `Residual` in the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

from samplers import Residual, SolverSchedule

from .objective import Objective
from .space import NARROWEST, SearchSpace

WARM_UP = 10  # steps until the full rate
POWER = 0.75


@dataclass(frozen=True)
class Refined:
    """A refined schedule.

    Attributes:
        schedule: the best on the validation noises; the start itself where nothing was better.
        start: validation error of the start.
        value: validation error of the result.
        history: (step, validation error) where it was measured.
        evaluations: network evaluations per gradient step's sample that were spent, forward ones, times the samples.
    """

    schedule: SolverSchedule
    start: float
    value: float
    history: list[tuple[int, float]]
    evaluations: int


def refine(
    schedule: SolverSchedule,
    space: SearchSpace,
    train: Objective,
    validation: Objective,
    *,
    steps: int = 200,
    batch: int = 32,
    rate: float | None = None,
    coefficients: bool = True,
    patience: int = 6,
    every: int = 20,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> Refined:
    """Lower the endpoint error by gradient steps on the times and, optionally, on every coefficient of the steps.

    Args:
        schedule: a member of ``space`` without noise.
        space: decides the ends and the order of the times.
        train: endpoint objective whose noises are descended on.
        validation: endpoint objective on other noises, which picks the result and stops early.
        steps: gradient steps; each costs about three evaluations of ``batch`` samples.
        batch: noises per step.
        rate: Adam's, on log gaps; a fifth of it on coefficients. It rises over the first steps and falls to zero. None takes
            0.3 / nfe: Adam moves every number by the rate, and longer schedules have more of them.
        coefficients: also learn additions to the coefficients of states and x0-predictions.
        patience: measurements without progress after which it stops.
        every: gradient steps between measurements.
        seed: of the batches.
        progress: called with (step, validation error).

    Raises:
        ValueError: a stochastic schedule, or objectives without a converged reference.
    """
    if schedule.stochastic:
        raise ValueError("refinement follows one solution: the schedule must draw no noise")
    if train.reference is None or validation.reference is None:
        raise ValueError("refinement needs endpoint objectives, which have a converged reference")
    if rate is None:
        rate = 0.3 / schedule.nfe
    genes = _Genes(schedule, space, coefficients)
    groups = [{"params": [genes.logs], "lr": rate}, {"params": genes.additions, "lr": rate / 5}]
    groups = [group for group in groups if group["params"]]
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.99))
    rates = [group["lr"] for group in groups]
    rng = torch.Generator().manual_seed(seed)
    best, start = schedule, validation(schedule)
    value, history, waited, spent = start, [(0, start)], 0, 0
    for step in range(1, steps + 1):
        for group, base in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = base * min(1.0, step / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * (step - 1) / steps))
        index = torch.randperm(len(train.x_T), generator=rng)[:batch]
        with torch.enable_grad():
            loss = _loss(genes.symbolic(), train, index)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
        torch.nn.utils.clip_grad_norm_([genes.logs, *genes.additions], 1.0)
        optimiser.step()
        spent += 3 * schedule.nfe * len(index)
        if step % every and step < steps:
            continue
        candidate = genes.plain()
        measured = validation(candidate)
        spent += schedule.nfe * len(validation.x_T)
        history.append((step, measured))
        if progress is not None:
            progress(step, measured)
        if measured < value:
            best, value, waited = candidate, measured, 0
        elif (waited := waited + 1) >= patience:
            break
    return Refined(best, start, value, history, spent)


def _loss(schedule: SolverSchedule, objective: Objective, index: Tensor) -> Tensor:
    """Logarithm of a mean error on these noises, so that the step size means the same at every scale.

    The mean is taken over errors to the power 2 `POWER`: in the RMSE itself the few samples that end in another mode than they
    should outweigh all others, and what repairs them in one batch spoils the next.
    """
    assert objective.reference is not None
    x = objective.solve(schedule, index, first_x0=objective.first_x0)
    squares = (x - objective.reference[index]).square().flatten(1).mean(1)
    return squares.clamp_min(1e-16).pow(POWER).mean().log() / (2 * POWER)


class _Genes:
    """A schedule's continuous genes as leaf tensors."""

    def __init__(self, schedule: SolverSchedule, space: SearchSpace, coefficients: bool) -> None:
        self.schedule, self.space = space.adopt(schedule) if schedule.times[-1] != space.final_time else schedule, space
        gaps = torch.from_numpy(space.gaps(self.schedule))
        self.logs = gaps.log().requires_grad_()
        n = len(self.schedule.steps)
        self.states: list[Tensor] = []
        self.answers: list[Tensor] = []
        for i, step in enumerate(self.schedule.steps if coefficients else ()):
            old = step.delta or Residual()
            self.states.append(_padded(old.x, i + 1))
            self.answers.append(_padded(old.x0, i + 1))
        # The last step to sigma = 0 returns x0-predictions alone: states carry noise there.
        self.frozen = {n - 1} if self.space.final_time == 0.0 else set()
        self.additions = [t for i, t in enumerate(self.states) if i not in self.frozen] + self.answers

    def symbolic(self) -> SolverSchedule:
        """The schedule with tensors in place of numbers."""
        shares = torch.softmax(self.logs, 0) * (1 - NARROWEST * len(self.logs)) + NARROWEST
        low, high = self.space.lambda_range
        lam = low + (high - low) * shares.cumsum(0)[:-1]
        times = (self.schedule.times[0], *self.space.noise_schedule.t_of_lam(lam).unbind(), self.schedule.times[-1])
        steps = []
        for i, step in enumerate(self.schedule.steps):
            if self.answers:
                x = () if i in self.frozen else tuple(self.states[i].unbind())
                step = msgspec.structs.replace(step, delta=Residual(x=x, x0=tuple(self.answers[i].unbind())))
            steps.append(step)
        return msgspec.structs.replace(self.schedule, times=times, steps=tuple(steps))

    def plain(self) -> SolverSchedule:
        """The schedule with the numbers as they are now, rounded to nine digits."""
        symbolic = self.symbolic()
        times = (symbolic.times[0], *(_number(t) for t in symbolic.times[1:-1]), symbolic.times[-1])
        steps = []
        for step in symbolic.steps:
            if self.answers and step.delta is not None:
                delta = Residual(x=tuple(map(_number, step.delta.x)), x0=tuple(map(_number, step.delta.x0)))
                step = msgspec.structs.replace(step, delta=delta)
            steps.append(step)
        return msgspec.structs.replace(self.schedule, times=times, steps=tuple(steps))


def _padded(values: tuple[float, ...], n: int) -> Tensor:
    return torch.tensor([*values, *[0.0] * (n - len(values))], dtype=torch.float64).requires_grad_()


def _number(value: Tensor) -> float:
    return float(f"{value.item():.9g}")

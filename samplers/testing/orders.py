r"""Measured orders: how fast one step's error falls with its width, with an exact history, against an exact solution.

A slope fitted to whole runs lies: the error of a correct second-order multistep run changes sign with the number of
steps, and first-order starting steps cap what follows. The local error of one step has no such excuse: order p means
slope p + 1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, Protocol

import msgspec
import torch
from torch import Tensor

from ..engine import Engine
from ..noise import NoiseSchedule
from ..recipes import parse_recipe
from ..statistics import EmpiricalStatistics
from ..strategy import SolverSchedule, StepStrategy
from ..tableau import Tableau

WIDTHS = tuple(0.02 * 2 ** (k / 4) for k in range(7))  # 0.02 .. 0.057, in lambda
UNEVEN = (0.8, 1.3, 0.7, 1.0)  # widths of earlier steps relative to the last, latest first
# For steps that need some; which ones does not matter to their order, as long as no kink lies within a step.
_LINES = [torch.tensor(ends, dtype=torch.float64) for ends in ((-8.0, 8.0), (0.9, 0.1), (0.3, -0.8), (0.4, -0.2))]
STATISTICS = EmpiricalStatistics(_LINES[0], _LINES[1], _LINES[2], _LINES[3])
Grid = Literal["lambda", "sigma"]


class ExactFlow(Protocol):
    """A denoiser together with the exact solution of its sampling ODE."""

    def start(self, t: Tensor) -> Tensor:
        """States (B, *E) to begin with at time t."""
        ...

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        """The x0-prediction at (x, t)."""
        ...

    def solve(self, x: Tensor, t: Tensor, to: Tensor) -> Tensor:
        """The state at time ``to`` of the solution through x at time t."""
        ...


class GaussianFlow:
    r"""Samples of different Gaussians $N(m, s^2)$, for which $x_t - \alpha m \propto \sqrt{\alpha^2 s^2 + \sigma^2}$.

    Several means and stds at once, because for a single one the leading error term may vanish at some time.
    """

    def __init__(
        self,
        noise_schedule: NoiseSchedule,
        means: Sequence[float] = (0.5, -1.0, 2.0, -0.3, 1.1),
        stds: Sequence[float] = (0.2, 0.5, 0.9, 1.6, 3.0),
    ) -> None:
        """One sample per pair of mean and std."""
        self.noise = noise_schedule
        self.mean = torch.tensor(means, dtype=torch.float64)[:, None]
        self.std = torch.tensor(stds, dtype=torch.float64)[:, None]

    def _levels(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        alpha, sigma = self.noise.alpha_sigma(t)
        return alpha, sigma, (alpha * self.std) ** 2 + sigma**2

    def start(self, t: Tensor) -> Tensor:
        """(B, 1): one standard deviation above the mean at time t."""
        alpha, _, variance = self._levels(t)
        return alpha * self.mean + variance.sqrt()

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        """The exact posterior mean."""
        alpha, _, variance = self._levels(t)
        return self.mean + alpha * self.std**2 / variance * (x - alpha * self.mean)

    def solve(self, x: Tensor, t: Tensor, to: Tensor) -> Tensor:
        """The exact solution, linear in x."""
        alpha, _, variance = self._levels(t)
        alpha_to, _, variance_to = self._levels(to)
        return alpha_to * self.mean + (variance_to / variance).sqrt() * (x - alpha * self.mean)


def history_times(
    noise_schedule: NoiseSchedule,
    steps: int,
    width: float,
    *,
    at: float = 0.0,
    grid: Grid = "lambda",
    ratios: Sequence[float] = (),
    after: int = 0,
) -> tuple[float, ...]:
    """Times of ``steps`` steps, of which the last starts at lambda = ``at`` and is ``width`` wide.

    Args:
        noise_schedule: where the times lie.
        steps: number of steps.
        width: of the last step, in lambda or relative to sigma / alpha.
        at: lambda at the start of the last step.
        grid: variable in which widths are measured.
        ratios: widths of earlier steps relative to the last, latest first; 1 where missing.
        after: further steps of the same width behind the last.
    """
    place, places = 0.0, [width * k for k in range(1 + after, -1, -1)]
    for k in range(steps - 1):
        place -= width * (ratios[k] if k < len(ratios) else 1.0)
        places.append(place)
    places.reverse()
    lam = [at + p if grid == "lambda" else at - math.log(1.0 - p) for p in places]
    return tuple(noise_schedule.t_of_lam(torch.tensor(lam, dtype=torch.float64)).tolist())


def local_errors(
    steps: Sequence[StepStrategy],
    noise_schedule: NoiseSchedule,
    widths: Sequence[float] = WIDTHS,
    *,
    flow: ExactFlow | None = None,
    at: float = 0.0,
    grid: Grid = "lambda",
    ratios: Sequence[float] = (),
) -> list[float]:
    """Error (Euclidean, over all samples) of the last of ``steps`` for every width, all that came before being exact.

    Exact states are handed to the engine up to the node that the last step starts from. If the last step has a
    corrector, the corrected state is measured; correctors of earlier steps are left out.
    """
    exact_flow = GaussianFlow(noise_schedule) if flow is None else flow
    last, n = steps[-1], len(steps)
    plan = [msgspec.structs.replace(step, corr=None) for step in steps[:-1]]
    if last.corr is None:
        plan.append(last)
    else:
        # One more step, whose evaluation the corrector needs; re-evaluating hands the corrected state out.
        plan += [msgspec.structs.replace(last, corr=msgspec.structs.replace(last.corr, reeval=True)), StepStrategy()]
    errors = []
    for width in widths:
        times = history_times(noise_schedule, n, width, at=at, grid=grid, ratios=ratios, after=len(plan) - n)
        t = torch.tensor(times, dtype=torch.float64)
        first = exact_flow.start(t[0])
        schedule = SolverSchedule(times=times, steps=tuple(plan))
        engine = Engine(Tableau.build(schedule, noise_schedule, statistics=STATISTICS), first)
        for j in range(n):
            x = exact_flow.solve(first, t[0], t[j]) if j <= n + last.start else engine.x
            engine.tell(exact_flow.denoise(x, t[j]), x)
        if last.corr is not None:
            engine.tell(exact_flow.denoise(engine.x, t[n]))
        errors.append((engine.x - exact_flow.solve(first, t[0], t[n])).norm().item())
    return errors


def slope(widths: Sequence[float], errors: Sequence[float]) -> float:
    """Slope of the least-squares line through log(error) over log(width)."""
    x, y = torch.tensor(widths, dtype=torch.float64).log(), torch.tensor(errors, dtype=torch.float64).log()
    x = x - x.mean()
    return ((x * y).sum() / (x * x).sum()).item()


def local_order(
    steps: Sequence[StepStrategy],
    noise_schedule: NoiseSchedule,
    *,
    at: float = 0.0,
    grid: Grid = "lambda",
    ratios: Sequence[float] = (),
    widths: Sequence[float] = WIDTHS,
) -> float:
    """Measured order of the last of ``steps`` (its corrector's if it has one): the local slope less 1."""
    return slope(widths, local_errors(steps, noise_schedule, widths, at=at, grid=grid, ratios=ratios)) - 1.0


def recipe_steps(
    text: str, noise_schedule: NoiseSchedule, *, corrected: bool = False
) -> tuple[tuple[StepStrategy, ...], int | None, Grid]:
    """A recipe's steps up to the first of full order, the order it declares, and the grid on which it declares it.

    Args:
        text: recipe text.
        noise_schedule: what the recipe is made for.
        corrected: let the last of the steps keep its free corrector, if it has one. One that evaluates again is the
            method itself and stays.
    """
    parsed = parse_recipe(text)
    options = dict(parsed.options)
    if "lower_order_final" in options:
        options["lower_order_final"] = False
    reach = max(int(options.get("order", 1)), parsed.recipe.nfe_per_step)
    parsed = dataclasses.replace(parsed, options=options, common={**parsed.common, "final": "sigma_min"})
    nfe = 2 * reach + 4
    lam = torch.linspace(-2.0, 2.0, parsed.macro_steps(noise_schedule, nfe) + 1, dtype=torch.float64)
    at = tuple(noise_schedule.t_of_lam(lam).tolist())  # away from alpha = 0, where some recipes begin otherwise
    steps = list(parsed.schedule(noise_schedule, nfe, at=at).steps[:reach])
    corr = steps[-1].corr
    if corr is not None and not corr.reeval and not corrected:
        steps[-1] = msgspec.structs.replace(steps[-1], corr=None)
    grid: Grid = "sigma" if parsed.recipe.order_grid == "even-sigma" else "lambda"
    return tuple(steps), parsed.recipe.order(options), grid

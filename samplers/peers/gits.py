r"""GITS (Chen et al. 2024, arXiv:2405.11326): a model's time grid by dynamic programming over a teacher's trajectory.

Everything happens in the frame $y = x / \alpha$, $s = \sigma / \alpha$ where the noise prediction is the slope
(flow models: $x$, $t$ and the velocity).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

from ..engine import Denoiser, iterate
from ..noise import NoiseSchedule
from ..recipes import parse_recipe
from ..strategy import SolverSchedule

METRICS = ("dev", "l1", "l2")
TEACHERS = {
    "vp": "ipndm:grid=karras,final=sigma_min",
    "edm": "ipndm:grid=karras,final=sigma_min",
    "flow": "lms:grid=linspace,final=sigma_min",
}


@dataclass(frozen=True)
class Trajectory:
    """A teacher's run in the frame where sampling moves along the slope.

    Attributes:
        times: (N + 1) times of the noise schedule.
        levels: (N + 1,) the integration variable: sigma / alpha, or t for flow models.
        states: (N + 1, B, *E) states.
        slopes: (N, B, *E) derivative of the state in ``levels``, at every time but the last.
    """

    times: tuple[float, ...]
    levels: Tensor
    states: Tensor
    slopes: Tensor


def teacher_trajectory(
    denoiser: Denoiser, x: Tensor, noise_schedule: NoiseSchedule, teacher: str | SolverSchedule | None = None, steps: int = 60
) -> Trajectory:
    """Run the teacher and keep its states and slopes.

    Args:
        denoiser: as in `samplers.sample`.
        x: (B, *E) noise at t_max.
        noise_schedule: the denoiser's.
        teacher: recipe text with one evaluation per step, or a schedule of that kind; None is iPNDM on the Karras grid (flow:
            Adams-Bashforth on the velocity, uniform in t).
        steps: steps of the teacher, when it is recipe text.

    Raises:
        ValueError: the teacher draws noise, corrects or evaluates more than once per step, or alpha is 0 at t_max (not flow).
    """
    teacher = TEACHERS[noise_schedule.family] if teacher is None else teacher
    schedule = parse_recipe(teacher).schedule(noise_schedule, steps) if isinstance(teacher, str) else teacher
    plain = all(step.eval.source == "model" and step.corr is None for step in schedule.steps)
    if schedule.stochastic or not plain:
        raise ValueError("the teacher must be deterministic, without corrector and with one evaluation per step")
    flow = noise_schedule.family == "flow"
    times = torch.tensor(schedule.times, dtype=torch.float64)
    alpha, sigma = noise_schedule.alpha_sigma(times)
    if flow:
        scales, levels = torch.ones_like(times), times
    elif bool((alpha == 0).any()):
        raise ValueError(f"alpha is 0 at t = {times[0]:g}, where x / alpha is not defined; give a teacher that starts below it")
    else:
        scales, levels = 1 / alpha, sigma / alpha
    states: list[Tensor] = []
    slopes: list[Tensor] = []
    predictions: list[Tensor] = []
    for i, engine in enumerate(iterate(_recording(denoiser, predictions), x, schedule, noise_schedule)):
        if i:  # after the answer at node i - 1
            states_before, level = states[-1], levels[i - 1].item()
            slopes.append((states_before - predictions[-1].to(states_before)) / level)
        states.append(engine.x * scales[i].item())
    return Trajectory(schedule.times, levels, torch.stack(states), torch.stack(slopes))


def _recording(denoiser: Denoiser, into: list[Tensor]) -> Denoiser:
    def record(x: Tensor, t: Tensor) -> Tensor:
        into.append(denoiser(x, t))
        return into[-1]

    return record


def gits_cost(trajectory: Trajectory, metric: str = "dev") -> Tensor:
    r"""(N + 1, N + 1) cost of one Euler step from time i to time j > i of the teacher; infinite elsewhere.

    "l1" and "l2": mean over the batch of the distance to the teacher's state. "dev": how much further than the teacher the
    step ends from the straight line between the trajectory's ends.

    Raises:
        ValueError: unknown metric.
    """
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}; known: {', '.join(METRICS)}")
    states, slopes = trajectory.states.flatten(2).double(), trajectory.slopes.flatten(2).double()
    n, levels = len(states) - 1, trajectory.levels
    start, end = states[0], states[-1]
    chord = (end - start) / (end - start).norm(dim=-1, keepdim=True)

    def deviation(points: Tensor) -> Tensor:
        across = points - start
        distance: Tensor = (across - (across * chord).sum(-1, keepdim=True) * chord).norm(dim=-1)
        return distance.mean(-1)

    own = deviation(states)
    cost = torch.full((n + 1, n + 1), torch.inf, dtype=torch.float64)
    for i in range(n):
        reached = states[i] + (levels[i + 1 :] - levels[i])[:, None, None] * slopes[i]
        if metric == "dev":
            cost[i, i + 1 :] = deviation(reached) - own[i + 1 :]
        else:
            cost[i, i + 1 :] = (reached - states[i + 1 :]).norm(p=1 if metric == "l1" else 2, dim=-1).mean(-1)
    return cost


def cheapest_path(cost: Tensor | Sequence[Sequence[float]], steps: int, coefficient: float = 1.15) -> tuple[int, ...]:
    r"""The path 0 = i_0 < i_1 < ... < i_steps = N with the least $\sum_k \gamma^k c_{i_k i_{k+1}}$, by dynamic programming.

    Args:
        cost: (N + 1, N + 1); only i < j is read.
        steps: edges of the path, 1..N.
        coefficient: gamma, the weight of the rest of the path against the next edge.

    Raises:
        ValueError: more steps than the matrix has edges in a row, or a coefficient that is not positive.
    """
    matrix = torch.as_tensor(cost, dtype=torch.float64)
    n = len(matrix) - 1
    if not 1 <= steps <= n:
        raise ValueError(f"a path through {n + 1} times has 1..{n} steps, got {steps}")
    if not coefficient > 0:
        raise ValueError(f"coefficient must be positive, got {coefficient}")
    edges = torch.where(torch.ones_like(matrix).triu(1) > 0, matrix, torch.inf)
    value, choices = edges[:, n].clone(), []
    for _ in range(steps - 1):
        rest = value.clone()
        rest[n] = torch.inf  # the end is reached by the last edge only
        value, chosen = (edges + coefficient * rest).min(dim=1)
        choices.append(chosen)
    path = [0]
    for chosen in reversed(choices):
        path.append(int(chosen[path[-1]]))
    return (*path, n)


def gits(
    text: str,
    denoiser: Denoiser,
    noise_schedule: NoiseSchedule,
    x: Tensor,
    nfe: int,
    *,
    metric: str = "dev",
    coefficient: float = 1.15,
    trajectory: Trajectory | None = None,
    cost: Tensor | None = None,
) -> SolverSchedule:
    """A recipe on the GITS time grid of this model.

    Args:
        text: recipe text; a grid in it is overruled. ``final=sigma_min`` keeps the teacher's last time instead of 0.
        denoiser: as in `samplers.sample`.
        noise_schedule: the denoiser's.
        x: (B, *E) noises for the teacher; the paper uses 256.
        nfe: network evaluations.
        metric: see `gits_cost`.
        coefficient: see `cheapest_path`; the paper uses 1.15, and 0.8 to 1.2 for guided latent models.
        trajectory: of `teacher_trajectory`, when it is used for several NFE.
        cost: of `gits_cost` for that trajectory and metric, likewise.

    Raises:
        ValueError: as in `samplers.recipe`, `teacher_trajectory`, `gits_cost` and `cheapest_path`.
    """
    parsed = parse_recipe(text)
    run = teacher_trajectory(denoiser, x, noise_schedule) if trajectory is None else trajectory
    path = cheapest_path(gits_cost(run, metric) if cost is None else cost, parsed.macro_steps(noise_schedule, nfe), coefficient)
    times = [run.times[i] for i in path]
    if parsed.common["final"] == "zero":
        times[-1] = 0.0
    schedule = parsed.schedule(noise_schedule, nfe, at=tuple(times))
    facts = {
        "grid": "gits",
        "metric": metric,
        "coefficient": coefficient,
        "teacher_steps": len(run.times) - 1,
        "noises": run.states.shape[1],
    }
    return msgspec.structs.replace(schedule, name=f"{schedule.name}-gits", provenance=facts)

"""Times that others learn: LD3's two sets (where the state is, and what the network is told), and DC-Solver's history shift."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import msgspec
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from ..engine import Denoiser, Engine, sample
from ..noise import NoiseSchedule
from ..recipes import parse_recipe
from ..strategy import Evaluation, SolverSchedule
from ..tableau import Tableau
from .reading import Source, number_array, read_table

LAMBDA_START = -5.1  # where states at alpha = 0 count as being


def cumulative_softmax(logits: Tensor, t_max: float, t_min: float) -> Tensor:
    r"""LD3's times (arXiv:2405.15506): the range in shares $\mathrm{softmax}(\xi)$, summed up; differentiable.

    Args:
        logits: (steps,).
        t_max: the first time.
        t_min: the last time.

    Returns:
        (steps + 1,) decreasing from t_max to t_min.
    """
    shares = torch.softmax(logits, dim=0).cumsum(0)
    return torch.cat([logits.new_full((1,), t_max), t_max - (t_max - t_min) * shares])


def decoupled(schedule: SolverSchedule, told: Sequence[float], *, keep: Literal["x0", "eps"] = "eps") -> SolverSchedule:
    """Tell the network other times than the states' own.

    Args:
        schedule: the solver.
        told: one time per step.
        keep: what the answer is taken for at the state's own time: its noise prediction ("eps", LD3 and S4S) or its
            x0-prediction ("x0", EDM-style methods).

    Raises:
        ValueError: another number of times.
    """
    if len(told) != len(schedule.steps):
        raise ValueError(f"{len(schedule.steps)} steps need as many evaluation times, got {len(told)}")
    steps = []
    for step, own, t in zip(schedule.steps, schedule.times, told, strict=False):
        shift = float(t) - own if step.eval.source == "model" else 0.0
        evaluation = msgspec.structs.replace(step.eval, t_scale=1.0, t_shift=shift, keep=keep if shift else "x0")
        steps.append(msgspec.structs.replace(step, eval=evaluation))
    return msgspec.structs.replace(schedule, steps=tuple(steps))


def from_ld3(source: Source, text: str, noise_schedule: NoiseSchedule) -> SolverSchedule:
    """A recipe at the times that LD3 learned for it.

    Args:
        source: a mapping or file with ``best_t_steps`` (2 (steps + 1),): the states' times, then the evaluations'.
        text: recipe text of the solver they were learned for, with one evaluation per step.
        noise_schedule: the model's.

    Raises:
        ValueError: not such a table, or a recipe with other times of its own.
    """
    both = number_array(read_table(source), "best_t_steps", 1).tolist()
    if len(both) < 4 or len(both) % 2:
        raise ValueError(f"best_t_steps holds two sets of times, got {len(both)} numbers")
    times, told = both[: len(both) // 2], both[len(both) // 2 : -1]
    schedule = parse_recipe(text).schedule(noise_schedule, len(times) - 1, at=tuple(times))
    if len(schedule.steps) != len(told):
        raise ValueError(f"recipe {text!r} has times of its own between those of the grid")
    facts = {"imported_from": "ld3", "recipe": text}
    return msgspec.structs.replace(decoupled(schedule, told), name=f"ld3-nfe{schedule.nfe}", provenance=facts)


def compensated(schedule: SolverSchedule, ratios: Sequence[float]) -> SolverSchedule:
    r"""DC-Solver's dynamic compensation (arXiv:2409.03755): the newest prediction is read off the history's polynomial.

    Before step i the prediction at t_i is replaced by the quadratic in t through the last three, at
    $t_{i-1} + \rho_i (t_i - t_{i-1})$; $\rho = 1$ changes nothing.

    Args:
        schedule: the solver, usually UniPC.
        ratios: rho of every step; those of the first two, which have no three predictions, must be 1.

    Raises:
        ValueError: another number of ratios, or one that its step cannot use.
    """
    if len(ratios) != len(schedule.steps):
        raise ValueError(f"{len(schedule.steps)} steps need as many ratios, got {len(ratios)}")
    steps = [msgspec.structs.replace(s, hist_shift=float(rho) - 1.0) for s, rho in zip(schedule.steps, ratios, strict=True)]
    return msgspec.structs.replace(schedule, steps=tuple(steps))


@torch.no_grad()
def fit_compensation(
    schedule: SolverSchedule,
    denoiser: Denoiser,
    noise_schedule: NoiseSchedule,
    x: Tensor,
    targets: Sequence[Tensor],
    *,
    bounds: tuple[float, float] = (-1.0, 3.0),
) -> SolverSchedule:
    """`compensated` with the ratios that bring every state nearest to the teacher's, one step after the other.

    Args:
        schedule: the solver; every evaluation once per step, ODE only.
        denoiser: as in `samplers.sample`.
        noise_schedule: the denoiser's.
        x: (B, *E) noises; the paper uses ten.
        targets: (B, *E) teacher's states at ``schedule.times[1:]``.
        bounds: where ratios are looked for.

    Raises:
        ValueError: a stochastic schedule, a re-evaluating corrector, or another number of targets.
    """
    n = len(schedule.steps)
    if schedule.stochastic or schedule.nfe != n:
        raise ValueError("history shifts are fitted for deterministic schedules with one evaluation per step")
    if len(targets) != n:
        raise ValueError(f"{n} steps need as many target states, got {len(targets)}")
    ratios = [1.0] * n
    answers: list[Tensor] = []

    def state(i: int) -> tuple[Tensor, Tensor | None]:
        """The state after step i with the answers so far, and the time it is evaluated at."""
        engine = Engine(Tableau.build(compensated(schedule, ratios), noise_schedule), x)
        for answer in answers[: i + 1]:
            engine.tell(answer)
        return engine.memory[f"x{i + 1}"], None if engine.query is None else engine.query.t

    answers.append(denoiser(x, torch.tensor(schedule.times[0], dtype=torch.float64)))
    for i in range(n):
        if i >= 2:

            def loss(rho: float, i: int = i) -> float:
                ratios[i] = rho
                return float((state(i)[0] - targets[i]).square().mean())

            ratios[i] = min((float(minimize_scalar(loss, bounds=bounds, method="bounded").x), 1.0), key=loss)
        reached, t = state(i)
        if t is not None:
            answers.append(denoiser(reached, t))
    return compensated(schedule, ratios)


def fit_evaluation_times(
    schedule: SolverSchedule,
    denoiser: Denoiser,
    noise_schedule: NoiseSchedule,
    x: Tensor,
    target: Tensor,
    *,
    steps: int = 60,
    rate: float = 0.03,
    keep: Literal["x0", "eps"] = "eps",
) -> SolverSchedule:
    r"""`decoupled` with the times that bring the result nearest to the target, by gradients through the sampler (LD3).

    What is learned is a shift in $\lambda$ per evaluation; the states' own times stay (`search.refine` learns those).

    Args:
        schedule: the solver; no fresh noise.
        denoiser: differentiable in the state and the time.
        noise_schedule: the denoiser's.
        x: (B, *E) noises.
        target: (B, *E) where a teacher takes them.
        steps: of Adam.
        rate: its learning rate.
        keep: as in `decoupled`.

    Returns:
        The schedule with the smallest error that was met; the given one where nothing was better.

    Raises:
        ValueError: a stochastic schedule.
    """
    if schedule.stochastic:
        raise ValueError("evaluation times are fitted for deterministic schedules")
    own = torch.tensor(schedule.times[:-1], dtype=torch.float64)
    floor = noise_schedule.lam(noise_schedule.t_max).clamp(min=LAMBDA_START)
    lam = noise_schedule.lam(own).clamp(min=floor)
    shifts = torch.zeros_like(lam, requires_grad=True)
    optimiser = torch.optim.Adam([shifts], lr=rate)
    best, least = schedule, math.inf
    with torch.enable_grad():
        for _ in range(steps + 1):
            told = noise_schedule.t_of_lam((lam + shifts).clamp(min=floor)).clamp(min=noise_schedule.t_min)
            symbolic = tuple(
                msgspec.structs.replace(s, eval=Evaluation(t_shift=after - before, keep=keep))
                if s.eval.source == "model"
                else s
                for s, before, after in zip(schedule.steps, own, told, strict=True)
            )
            out = sample(denoiser, x, msgspec.structs.replace(schedule, steps=symbolic), noise_schedule)
            assert isinstance(out, Tensor)
            loss = (out - target).square().mean()
            if loss.item() < least:
                least = loss.item()
                best = decoupled(schedule, told.tolist(), keep=keep) if bool(shifts.detach().any()) else schedule
            optimiser.zero_grad(set_to_none=True)
            loss.log().backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    return best

"""Random valid solver schedules over every option: what holds for all of them holds for the core."""

from __future__ import annotations

import random
from typing import Literal

import torch

from ..noise import NoiseSchedule
from ..strategy import Corrector, Evaluation, Relax, Residual, SolverSchedule, StepStrategy

RELAXATIONS: tuple[Relax, ...] = ("half", "bh1", "bh2", "exp+", "exp-")
Form = Literal["x0", "eps"]
FORMS: tuple[Form, ...] = ("x0", "eps")
Pred = Form | tuple[float, float]
Axis = Literal["lambda", "sigma", "t", "index"]
AXES: tuple[Axis, ...] = ("lambda", "lambda", "sigma", "t", "index")  # lambda twice as often
LAMBDA_RANGE = (-4.0, 4.0)


def random_schedule(
    rng: random.Random,
    noise_schedule: NoiseSchedule,
    *,
    max_steps: int = 6,
    pairs: bool = True,
    analytic: bool = True,
    deltas: bool = False,
    clips: bool = False,
) -> SolverSchedule:
    """A schedule that constructs and compiles, of 1..``max_steps`` steps, with any mixture of strategies.

    Args:
        rng: source of every choice.
        noise_schedule: where the times lie; its ends, alpha = 0 and sigma = 0 included, are often among them.
        max_steps: upper limit of steps.
        pairs: (l, r) predictions may occur.
        analytic: analytic first steps may occur.
        deltas: learned additions may occur.
        clips: clipping of x0 may occur.
    """
    n = rng.randint(1, max_steps)
    times = _times(rng, noise_schedule, n)
    no_signal = float(noise_schedule.alpha(times[0])) == 0
    to_zero = times[-1] == 0
    steps = []
    for i in range(n):
        low = 1 if no_signal else 0  # nodes below have no signal: pairs cannot use them
        pair = pairs and i >= low and rng.random() < 0.25 and not (to_zero and i == n - 1)
        steps.append(_step(rng, i, last=i == n - 1, to_zero=to_zero, no_signal=no_signal, pair=pair, deltas=deltas))
    if analytic and rng.random() < 0.3:
        source = Evaluation(source=rng.choice(("zero_x0", "average_x0")))
        steps[0] = StepStrategy(pred=rng.choice(("x0", "eps")), corr=steps[0].corr, eval=source)
    return SolverSchedule(
        times=times,
        steps=tuple(steps),
        name=rng.choice(("", "random")),
        path=rng.choice((None, {"type": noise_schedule.kind, **noise_schedule.parameters})),
        clip=rng.choice((None, "config", rng.uniform(0.5, 2.0))) if clips else None,
        provenance=rng.choice(({}, {"seed": rng.randint(0, 9), "note": ["é", None, True]})),
    )


def _times(rng: random.Random, noise: NoiseSchedule, n: int) -> tuple[float, ...]:
    gaps = [rng.uniform(0.5, 1.5) for _ in range(n)]
    low, high = LAMBDA_RANGE
    lam, points = low + rng.uniform(0.0, 1.0), []
    for gap in [0.0, *gaps]:
        lam += gap * (high - low - 1.0) / sum(gaps)
        points.append(lam)
    times = noise.t_of_lam(torch.tensor(points, dtype=torch.float64)).tolist()
    if rng.random() < 0.15:
        return tuple(reversed(times))
    if rng.random() < 0.4:
        times[0] = noise.t_max
    if rng.random() < 0.4:
        times[-1] = 0.0
    return tuple(times)


def _step(rng: random.Random, i: int, *, last: bool, to_zero: bool, no_signal: bool, pair: bool, deltas: bool) -> StepStrategy:
    ends_at_zero = last and to_zero
    first = 1 if no_signal and pair else 0
    start = rng.randint(first, i) if rng.random() < 0.25 else i
    from_no_signal = no_signal and start == 0
    pool = [node for node in range(first, i + 1) if node != start]
    pred: Pred = (rng.uniform(0.0, 1.5), rng.uniform(-1.0, 0.5)) if pair else rng.choice(FORMS)
    axis: Axis = "lambda" if pair else rng.choice(AXES)
    flat = (ends_at_zero and pred != "eps") or (from_no_signal and axis == "index" and pred == "eps")
    order = 1 if flat else rng.randint(1, min(4, len(pool) + 1))
    nodes, d_nodes, relax = _derivatives(rng, order, pool, i, finite=not ends_at_zero, explicit=bool(first))
    corr = None
    if not last and not flat and rng.random() < 0.5:
        highest = min(5, len(pool) + 2)
        corr_order = rng.randint(2, highest)
        known = None if nodes is None else len(nodes) + 1
        explicit = bool(first) or (known is not None and known < corr_order - 1)
        c_nodes, c_d, c_relax = _derivatives(rng, corr_order, [*pool, i + 1], i + 1, finite=True, explicit=explicit)
        corr = Corrector(order=corr_order, nodes=c_nodes, d_nodes=c_d, relax=c_relax, reeval=rng.random() < 0.3)
    delta = None
    if deltas and rng.random() < 0.5:
        x, x0 = (tuple(rng.uniform(-0.1, 0.1) for _ in range(rng.randint(0, i + 1))) for _ in range(2))
        delta = Residual(x=x, x0=x0)
    return StepStrategy(
        order=order,
        pred=pred,
        axis=axis,
        start=start - i - 1,
        nodes=nodes,
        d_nodes=d_nodes,
        relax=relax,
        corr=corr,
        keep_eps=rng.random() < 0.2,
        delta=delta,
    )


def _derivatives(
    rng: random.Random, order: int, pool: list[int], latest: int, *, finite: bool, explicit: bool
) -> tuple[tuple[int, ...] | None, tuple[int | tuple[int, ...] | None, ...], tuple[Relax, ...]]:
    """Nodes, d_nodes and relax of a Taylor step whose nodes come from ``pool`` (absolute; ``latest`` is -1)."""

    def some(at_least: int) -> tuple[int, ...]:
        chosen = rng.sample(pool, rng.randint(at_least, len(pool)))
        return tuple(node - latest - 1 for node in chosen)

    nodes = some(order - 1) if order > 1 and (explicit or rng.random() < 0.3) else None
    d_nodes: list[int | tuple[int, ...] | None] = []
    for k in range(1, rng.randint(0, order - 1) + 1):
        d_nodes.append(rng.choice((None, rng.randint(k, 4), some(k))))
    relax: list[Relax] = []
    for _ in range(rng.randint(0, order - 1)):
        choices: tuple[Relax, ...] = (None, rng.uniform(-0.3, 0.3), rng.choice(RELAXATIONS))
        relax.append(rng.choice(choices if finite else (None, "half")))
    return nodes, tuple(d_nodes), tuple(relax)

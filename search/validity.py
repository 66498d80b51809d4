"""What a step may be where it stands, and one form for schedules that do the same: every proposal passes through here."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from samplers import Corrector, Evaluation, NoiseSchedule, StepStrategy

ANALYTIC = ("zero_x0", "average_x0")


@dataclass(frozen=True)
class Ends:
    """What the noise schedule forbids at the ends of the interval.

    Attributes:
        pure_noise: alpha is 0 at the first time.
        to_zero: sigma is 0 at the last one.
        flow: the velocity may be expanded too.
    """

    pure_noise: bool
    to_zero: bool
    flow: bool

    @classmethod
    def of(cls, noise: NoiseSchedule, final_time: float) -> Ends:
        """The ends of [t_max, final_time]."""
        alpha, sigma = float(noise.alpha(noise.t_max)), float(noise.sigma(final_time))
        return cls(alpha == 0.0, sigma == 0.0, noise.family == "flow")


def repaired(steps: tuple[StepStrategy, ...], ends: Ends, noise: bool = False) -> tuple[StepStrategy, ...]:
    """The nearest steps that can be taken: every rule is a refusal of the compiler, applied before it is asked.

    Args:
        steps: in order.
        ends: of the interval.
        noise: whether steps may keep the noise that they have.
    """
    kept = steps if noise else tuple(msgspec.structs.replace(step, noise=None) for step in steps)
    return tuple(_repaired(step, i, len(kept), ends) for i, step in enumerate(kept))


def _repaired(step: StepStrategy, i: int, n: int, ends: Ends) -> StepStrategy:
    start = max(step.start, -(i + 1))
    order, pred, axis = min(step.order, i + 1), step.pred, step.axis
    reads_first = start == -(i + 1)
    if pred == "flow" and not ends.flow:
        pred = "x0"
    if i == n - 1 and ends.to_zero:
        pred = "x0" if isinstance(pred, tuple) else pred
        order = order if pred in ("eps", "flow") else 1
    if isinstance(pred, tuple) and ends.pure_noise and (reads_first or order == i + 1 or step.d_nodes):
        pred = "x0"
    if pred == "flow":
        axis = axis if axis in ("t", "index") else "t"
    elif isinstance(pred, tuple):
        axis = "lambda"
    if pred == "eps" and axis == "index" and ends.pure_noise and reads_first:
        axis = "lambda"
    low = _low(step, order)
    last_to_zero = i == n - 1 and ends.to_zero
    relax = () if order == 1 or pred == "flow" or last_to_zero else _trimmed(step.relax[: order - 1])
    source = step.eval.source if i == 0 and step.eval.source in ANALYTIC else "model"
    corr = None
    if step.corr is not None and i < n - 1 and not (isinstance(pred, tuple) and ends.pure_noise and i == 0):
        corr = Corrector(order=order + 1)
    axis = axis if order > 1 or corr is not None or pred == "flow" else "lambda"
    noisy = step.noise is not None and step.noise.kind == "tau" and pred == "x0" and axis == "lambda" and not last_to_zero
    evaluation = msgspec.structs.replace(step.eval, source=source)
    if source != "model":
        evaluation = Evaluation(source=source)
    return StepStrategy(
        order=order,
        pred=pred,
        axis=axis,
        start=start,
        d_nodes=() if low is None else (low,),
        relax=relax,
        corr=corr,
        eval=evaluation,
        noise=step.noise if noisy else None,
        delta=step.delta,
    )


def _low(step: StepStrategy, order: int) -> int | None:
    """How many nodes the first derivative uses, where that is fewer than the order offers."""
    given = step.d_nodes[0] if step.d_nodes else None
    return given if isinstance(given, int) and 1 <= given < order - 1 else None


def _trimmed(relax: tuple) -> tuple:
    """Without factors that are 1."""
    relax = tuple(None if value == 0.0 else value for value in relax)
    while relax and relax[-1] is None:
        relax = relax[:-1]
    return relax


def canonical(steps: tuple[StepStrategy, ...]) -> tuple[StepStrategy, ...]:
    """One form for steps that compile to the same numbers.

    (1, 0) is "x0" and (0, -1) "eps"; a first-order step without a corrector on either side is the same in every form.
    """
    out = []
    for i, step in enumerate(steps):
        pred = {(1.0, 0.0): "x0", (0.0, -1.0): "eps"}.get(step.pred, step.pred) if isinstance(step.pred, tuple) else step.pred
        plain = step.order == 1 and step.corr is None and (i == 0 or all(before.corr is None for before in steps[:i]))
        if plain and pred in ("eps", "flow"):
            pred = "x0"
        axis = "lambda" if plain else step.axis
        if pred == "flow" and axis not in ("t", "index"):
            axis = "t"
        out.append(msgspec.structs.replace(step, pred=pred, axis=axis))
    return tuple(out)

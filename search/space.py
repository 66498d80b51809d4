"""The space of solver schedules for one noise schedule and number of evaluations: random, mutate, cross, always valid."""

from __future__ import annotations

import random as standard_random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import msgspec
import numpy as np
import torch

from samplers import Corrector, Evaluation, Noise, NoiseSchedule, SolverSchedule, StepStrategy

from .validity import ANALYTIC, Ends, canonical, repaired

LAMBDA_START = -5.1  # coordinate of the first time where lambda is -inf there; also how far towards noise gaps reach for flow
NARROWEST = 2e-3  # smallest gap, as a share of the range in lambda

Rng = np.random.Generator | standard_random.Random | torch.Generator | int


def generator_of(rng: Rng) -> np.random.Generator:
    """NumPy's generator from whatever people hold: their own, Python's, torch's, or a seed.

    Raises:
        TypeError: none of these.
    """
    if isinstance(rng, np.random.Generator):
        return rng
    if isinstance(rng, standard_random.Random):
        return np.random.default_rng(rng.getrandbits(63))
    if isinstance(rng, torch.Generator):
        return np.random.default_rng(int(torch.randint(2**62, (), generator=rng)))
    if isinstance(rng, int | np.integer):
        return np.random.default_rng(int(rng))
    raise TypeError(f"rng must be a NumPy, Python or torch generator or a seed, got {type(rng).__name__}")


@dataclass(frozen=True)
class SearchSpace:
    """Solver schedules with at most ``nfe`` evaluations, from ``noise_schedule.t_max`` to ``final_time``.

    A schedule is its own genome: times, kept in order because moves act on the logarithms of the gaps between them in lambda,
    and one `StepStrategy` a step. Moves never leave the space, and what they make always compiles.

    Attributes:
        noise_schedule: the model's.
        nfe: the largest number of network evaluations.
        final_time: where every schedule ends; 0 is sigma = 0.
        max_order: Taylor orders 1..max_order.
        predictions: of "x0", "eps", "mixed" (a pair (l, r) between and around them) and "flow"; None takes what the family has.
        axes: variables of the polynomial besides "lambda".
        sources: analytic first steps that may be proposed: "zero_x0", "average_x0" (needs the objective's mean image).
        correctors: whether steps may have one.
        evaluation_shifts: whether the network may be told another time than the state's.
        noise: whether x0-steps may draw fresh noise; such schedules are told apart by a distribution's distance, not by the
            endpoint error.
    """

    noise_schedule: NoiseSchedule
    nfe: int
    final_time: float = 0.0
    max_order: int = 4
    predictions: tuple[str, ...] | None = None
    axes: tuple[str, ...] = ("lambda", "sigma", "t", "index")
    sources: tuple[str, ...] = ("zero_x0",)
    correctors: bool = True
    evaluation_shifts: bool = False
    noise: bool = False
    _ends: Ends = field(init=False, repr=False, compare=False)
    _range: tuple[float, float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: naming the setting, its value and what is allowed.
        """
        noise = self.noise_schedule
        if isinstance(self.nfe, bool) or not isinstance(self.nfe, int) or self.nfe < 1:
            raise ValueError(f"nfe must be a whole number of at least 1, got {self.nfe!r}")
        if not 0 <= self.final_time < noise.t_max:
            raise ValueError(f"final_time must lie in [0, {noise.t_max:g}), got {self.final_time}")
        if not 1 <= self.max_order <= 4:
            raise ValueError(f"max_order must be 1..4, got {self.max_order}")
        if self.predictions is None:
            flow = ("flow",) if noise.family == "flow" else ()
            object.__setattr__(self, "predictions", ("x0", "eps", "mixed", *flow))
        for name, values, known in (
            ("predictions", self.predictions, ("x0", "eps", "mixed", "flow")),
            ("axes", self.axes, ("lambda", "sigma", "t", "index")),
            ("sources", self.sources, ANALYTIC),
        ):
            if not set(values) <= set(known) or (name != "sources" and not values):
                raise ValueError(f"{name} must be among {', '.join(known)}, got {values!r}")
        object.__setattr__(self, "_ends", Ends.of(noise, self.final_time))
        low = max(float(noise.lam(noise.t_max)), LAMBDA_START if noise.family != "edm" else -np.inf)
        high = float(noise.lam(max(self.final_time, noise.t_min)))
        object.__setattr__(self, "_range", (low, high))

    def with_mean(self, available: bool) -> SearchSpace:
        """The space with or without first steps from the data's mean."""
        sources = tuple(s for s in self.sources if s != "average_x0") + (("average_x0",) if available else ())
        return replace(self, sources=sources)

    @property
    def lambda_range(self) -> tuple[float, float]:
        """Where times may lie, from noise to data, in lambda."""
        return self._range

    # ---- times ---------------------------------------------------------------------------------------------------

    def gaps(self, schedule: SolverSchedule) -> np.ndarray:
        """(n,) shares of the lambda range: n - 1 between evaluation times, the last from there to the end; they sum to 1."""
        low, high = self._range
        lam = self.noise_schedule.lam(torch.tensor(schedule.times[:-1], dtype=torch.float64)).numpy()
        place = np.concatenate([[0.0], np.clip((lam[1:] - low) / (high - low), 0.0, 1.0), [1.0]])
        return self._normalised(np.diff(place))

    def times(self, gaps: np.ndarray) -> tuple[float, ...]:
        """The inverse of `gaps`: evaluation times from t_max on, and the final time."""
        low, high = self._range
        shares = self._normalised(gaps)
        lam = torch.from_numpy(low + (high - low) * np.cumsum(shares)[:-1])
        inner = self.noise_schedule.t_of_lam(lam).tolist()
        return (self.noise_schedule.t_max, *(float(f"{t:.10g}") for t in inner), self.final_time)

    @staticmethod
    def _normalised(gaps: np.ndarray) -> np.ndarray:
        shares = np.maximum(gaps / gaps.sum(), NARROWEST)
        return shares / shares.sum()

    # ---- whole schedules -------------------------------------------------------------------------------------------

    def schedule(self, gaps: np.ndarray, steps: tuple[StepStrategy, ...], name: str = "") -> SolverSchedule:
        """The valid schedule nearest to these gaps and steps, in canonical form."""
        times = self.times(gaps)
        steps = canonical(repaired(steps, self._ends, self.noise))
        steps = tuple(self._told_in_range(step, t) for step, t in zip(steps, times[:-1], strict=True))
        path = {"type": self.noise_schedule.kind, **self.noise_schedule.parameters}
        return SolverSchedule(times=times, steps=steps, name=name or f"nfe{self.nfe}", path=path)

    def _told_in_range(self, step: StepStrategy, t: float) -> StepStrategy:
        """The step with an evaluation time that the noise schedule has."""
        told = step.eval.t_scale * t + step.eval.t_shift
        if self.noise_schedule.t_min <= told <= self.noise_schedule.t_max or step.eval == Evaluation(source=step.eval.source):
            return step
        return msgspec.structs.replace(step, eval=Evaluation(source=step.eval.source))

    def adopt(self, schedule: SolverSchedule, name: str = "") -> SolverSchedule:
        """A schedule from elsewhere made a member: its end moved here, its genes kept as far as they are valid here."""
        while schedule.nfe > self.nfe or any(step.eval.source == "none" for step in schedule.steps):
            schedule = self._without(schedule, len(schedule.steps) - 2 if len(schedule.steps) > 1 else 0)
        return self.schedule(self.gaps(schedule), schedule.steps, name or schedule.name)

    def contains(self, schedule: SolverSchedule) -> bool:
        """Whether the schedule ends here and costs at most ``nfe``."""
        return schedule.times[-1] == self.final_time and schedule.nfe <= self.nfe

    def random(self, rng: Rng) -> SolverSchedule:
        """A schedule with every component drawn independently; all ``nfe`` evaluations are used."""
        rng = generator_of(rng)
        source = _choice(rng, ("model", *self.sources))
        n = self.nfe + (source != "model")
        steps = [self._random_step(rng) for _ in range(n)]
        steps[0] = msgspec.structs.replace(steps[0], eval=Evaluation(source=source))
        return self.schedule(np.exp(0.7 * rng.standard_normal(n)), tuple(steps))

    def mutate(self, schedule: SolverSchedule, rng: Rng, scale: float = 1.0) -> SolverSchedule:
        """A neighbour: gaps jittered, some genes redrawn, seldom a step more or less.

        Args:
            schedule: a member.
            rng: source of randomness.
            scale: how far, 1 early and less late in a search; multiplies the widths of the continuous moves.
        """
        rng = generator_of(rng)
        for _ in range(20):
            changed = self._mutated(schedule, rng, scale)
            if changed.digest != schedule.digest:
                return changed
        return self.random(rng)  # a space with nothing to change but everything

    def cross(self, a: SolverSchedule, b: SolverSchedule, rng: Rng) -> SolverSchedule:
        """A child: times of one parent or between both, each step's genes from either parent's step at that place."""
        rng = generator_of(rng)
        first, second = (a, b) if rng.random() < 0.5 else (b, a)
        gaps = self.gaps(first)
        if len(first.steps) == len(second.steps) and rng.random() < 0.5:
            gaps = gaps ** (w := rng.random()) * self.gaps(second) ** (1 - w)
        whole = rng.random() < 0.5  # inherit whole component lists, or step by step
        takes = {gene: rng.random() < 0.5 for gene in ("pred", "order", "relax", "corr")}
        steps = []
        for i, own in enumerate(first.steps):
            other = second.steps[round(i * (len(second.steps) - 1) / max(len(first.steps) - 1, 1))]
            take = takes if whole else {gene: rng.random() < 0.5 for gene in takes}
            step = own
            if take["pred"]:
                step = msgspec.structs.replace(step, pred=other.pred, axis=other.axis, noise=other.noise)
            if take["order"]:
                step = msgspec.structs.replace(step, order=other.order, d_nodes=other.d_nodes, relax=(), start=other.start)
                step = msgspec.structs.replace(step, relax=other.relax)
            if take["relax"]:
                step = msgspec.structs.replace(step, relax=other.relax)
            if take["corr"]:
                step = msgspec.structs.replace(step, corr=other.corr)
            steps.append(step)
        return self.schedule(gaps, tuple(_consistent(step) for step in steps))

    # ---- moves ---------------------------------------------------------------------------------------------------

    def _random_step(self, rng: np.random.Generator) -> StepStrategy:
        order = int(rng.choice([1, 2, 3, 4], p=[0.2, 0.4, 0.3, 0.1]))
        order = min(order, self.max_order)
        relax = (float(0.15 * rng.standard_normal()),) if order > 1 and rng.random() < 0.3 else ()
        d_nodes = (int(rng.integers(1, 3)),) if order > 2 and rng.random() < 0.3 else ()
        corr = Corrector(order=order + 1) if self.correctors and rng.random() < 0.5 else None
        pred = self._random_prediction(rng)
        axis = "lambda" if rng.random() < 0.7 or isinstance(pred, tuple) else _choice(rng, self.axes)
        step = StepStrategy(order=order, pred=pred, axis=axis, relax=relax, d_nodes=d_nodes, corr=corr)
        return self._moved_noise(step, rng, 1.0) if self.noise and rng.random() < 0.4 else step

    def _random_prediction(self, rng: np.random.Generator) -> str | tuple[float, float]:
        kind = _choice(rng, self.predictions)
        if kind != "mixed":
            return kind
        l = float(rng.uniform(0.0, 1.0))
        return (l, l - 1.0)

    def _mutated(self, schedule: SolverSchedule, rng: np.random.Generator, scale: float) -> SolverSchedule:
        if rng.random() < 0.15:
            schedule = self._resized(schedule, rng)
        gaps, steps, n = self.gaps(schedule), list(schedule.steps), len(schedule.steps)
        kind = rng.random()
        if kind < 0.4:
            gaps = gaps * np.exp(0.25 * scale * rng.standard_normal(n))
        elif kind < 0.8:  # one time moves, its neighbours stay
            i = int(rng.integers(n))
            pair = gaps[i] + gaps[(i + 1) % n]
            share = _logistic(np.log(gaps[i] / gaps[(i + 1) % n]) + 0.8 * scale * rng.standard_normal())
            gaps[i], gaps[(i + 1) % n] = pair * share, pair * (1 - share)
        rate = (0.35 + 0.4 * (kind >= 0.8)) * max(scale, 0.4) * 2 / max(n, 2)
        for i in range(n):
            if rng.random() < rate:
                steps[i] = self._mutated_step(steps[i], rng, scale)
        return self.schedule(gaps, tuple(steps))

    def _mutated_step(self, step: StepStrategy, rng: np.random.Generator, scale: float) -> StepStrategy:
        change = msgspec.structs.replace
        if self.noise and rng.random() < 0.2:
            return self._moved_noise(step, rng, scale)
        move = str(rng.choice(["order", "pred", "relax", "low", "corr", "axis", "start", "shift"], p=_MOVES))
        if move == "order":
            order = int(np.clip(step.order + rng.choice([-1, 1]), 1, self.max_order))
            return change(step, order=order, relax=step.relax[: order - 1], d_nodes=step.d_nodes[: max(order - 1, 0)])
        if move == "pred":
            return self._moved_prediction(step, rng, scale)
        if move == "relax" and step.order > 1:
            k = int(rng.integers(step.order - 1)) if rng.random() < 0.3 else 0
            relax = [*step.relax, *[None] * (step.order - 1 - len(step.relax))]
            old = relax[k] if isinstance(relax[k], float) else 0.0
            relax[k] = None if rng.random() < 0.1 else float(f"{old + 0.12 * scale * rng.standard_normal():.6g}")
            return change(step, relax=tuple(relax))
        if move == "low" and step.order > 2:
            return change(step, d_nodes=() if step.d_nodes else (int(rng.integers(1, step.order - 1)),))
        if move == "corr" and self.correctors:
            return change(step, corr=None if step.corr else Corrector(order=step.order + 1))
        if move == "axis" and not isinstance(step.pred, tuple):
            return change(step, axis=_choice(rng, self.axes))
        if move == "start":
            return change(step, start=-1 if step.start < -1 or rng.random() < 0.5 else -2)
        if move == "shift" and self.evaluation_shifts and step.eval.source == "model":
            return change(
                step, eval=change(step.eval, t_scale=float(np.exp(np.log(step.eval.t_scale) + 0.02 * rng.standard_normal())))
            )
        return self._moved_prediction(step, rng, scale)

    def _moved_noise(self, step: StepStrategy, rng: np.random.Generator, scale: float) -> StepStrategy:
        """Noise comes, goes, or changes its amount tau; where it comes, the step expands x0 in lambda."""
        if step.noise is not None and rng.random() < 0.25:
            return msgspec.structs.replace(step, noise=None)
        old = step.noise.amount if step.noise is not None else 0.5
        amount = float(f"{np.clip(old + 0.4 * scale * rng.standard_normal(), 0.05, 2.0):.6g}")
        return msgspec.structs.replace(step, pred="x0", axis="lambda", noise=Noise(amount=amount))

    def _moved_prediction(self, step: StepStrategy, rng: np.random.Generator, scale: float) -> StepStrategy:
        if rng.random() < 0.4 or "mixed" not in self.predictions:
            pred: str | tuple[float, float] = self._random_prediction(rng)
        else:
            l, r = {"x0": (1.0, 0.0), "eps": (0.0, -1.0), "flow": (0.5, -0.5)}.get(step.pred, step.pred)  # type: ignore[call-overload]
            pred = tuple(float(f"{value:.6g}") for value in np.array([l, r]) + 0.2 * scale * rng.standard_normal(2))  # type: ignore[assignment]
        return _consistent(msgspec.structs.replace(step, pred=pred))

    def _resized(self, schedule: SolverSchedule, rng: np.random.Generator) -> SolverSchedule:
        """Another number of steps or another source of the first one; the evaluations stay within ``nfe``."""
        n, source = len(schedule.steps), schedule.steps[0].eval.source
        if rng.random() < 0.5 and self.sources:
            choices = [s for s in ("model", *self.sources) if s != source]
            chosen = _choice(rng, choices)
            if (chosen == "model") != (source == "model"):
                schedule = self._with(schedule, rng) if source == "model" else self._without(schedule, int(rng.integers(1, n)))
            first = msgspec.structs.replace(schedule.steps[0], eval=Evaluation(source=chosen))
            return self.schedule(self.gaps(schedule), (first, *schedule.steps[1:]))
        if schedule.nfe < self.nfe:
            return self._with(schedule, rng)
        if n > 2 and schedule.nfe > 1:
            # One out, one in: a step moves to another place.
            return self._with(self._without(schedule, int(rng.integers(1, n))), rng)
        return schedule

    def _with(self, schedule: SolverSchedule, rng: np.random.Generator) -> SolverSchedule:
        """One step more: the widest gaps are the likeliest to be cut."""
        gaps = self.gaps(schedule)
        i = int(rng.choice(len(gaps), p=gaps / gaps.sum()))
        cut = gaps[i] * rng.uniform(0.3, 0.7)
        steps = (
            *schedule.steps[: i + 1],
            msgspec.structs.replace(schedule.steps[i], eval=Evaluation()),
            *schedule.steps[i + 1 :],
        )
        return self.schedule(np.concatenate([gaps[:i], [cut, gaps[i] - cut], gaps[i + 1 :]]), steps)

    def _without(self, schedule: SolverSchedule, i: int) -> SolverSchedule:
        """One step less: step i's evaluation goes, its gap joins the one before."""
        if len(schedule.steps) == 1:
            raise ValueError("a schedule of one step cannot lose it")
        gaps = self.gaps(schedule)
        if i == 0:
            i = 1
        gaps[i - 1] += gaps[i]
        return self.schedule(np.delete(gaps, i), (*schedule.steps[:i], *schedule.steps[i + 1 :]))


_MOVES = [0.2, 0.25, 0.2, 0.05, 0.12, 0.08, 0.04, 0.06]


def _choice(rng: np.random.Generator, options: Sequence[str]) -> str:
    """One of the options itself: NumPy would return a copy, which msgspec does not recognise as a field's default."""
    return options[int(rng.integers(len(options)))]


def _logistic(x: float) -> float:
    return float(1.0 / (1.0 + np.exp(-x)))


def _consistent(step: StepStrategy) -> StepStrategy:
    """Genes that only fit others' orders or predictions, dropped."""
    axis = "lambda" if isinstance(step.pred, tuple) else step.axis
    return msgspec.structs.replace(step, axis=axis, relax=step.relax[: step.order - 1], d_nodes=step.d_nodes[: step.order - 1])

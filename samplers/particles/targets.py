"""What to sample: a product of powers of model laws, tilted by a reward."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

Exponent = float | Callable[[float], float]
RewardFunction = Callable[[Tensor], Tensor]
POTENTIALS = ("difference", "max", "add")


@dataclass(frozen=True, eq=False)
class Reward:
    r"""A tilt $e^{s\,r(x_0)}$.

    Attributes:
        fn: ``fn(x0: (B, *E)) -> (B,)``; sees x0-predictions on the way and the result itself at the end.
        scale: s, a number or a function of the noise schedule's time.
        potential: how the tilt is spread over the steps (Singhal et al. 2025, arXiv:2501.06848): "difference" telescopes to
            the tilt of the present state, "max" and "add" favour paths whose rewards were high. The end result is the same, but
            what the last two apply adds up over the evaluations on the way: keep these few with ``every``.
        gradient: steer the proposal along the reward's gradient, through the denoisers; weights account for it exactly.
        every: steps from one evaluation on the way to the next; the result is always evaluated.
    """

    fn: RewardFunction
    scale: Exponent = 1.0
    potential: str = "difference"
    gradient: bool = False
    every: int = 1

    def __post_init__(self) -> None:
        """Check.

        Raises:
            ValueError: unknown potential, a scale that is not finite, or a gradient with another potential than "difference".
        """
        if not callable(self.fn):
            raise ValueError(f"a reward is a function of x0, got {type(self.fn).__name__}")
        if self.potential not in POTENTIALS:
            raise ValueError(f"unknown potential {self.potential!r}; known: {', '.join(POTENTIALS)}")
        if not callable(self.scale) and not math.isfinite(self.scale):
            raise ValueError(f"the reward's scale must be finite, got {self.scale}")
        if not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"every must be a whole number of steps >= 1, got {self.every!r}")
        if self.gradient and self.every != 1:
            raise ValueError("a gradient is needed at every step; leave every at 1")
        if self.potential != "difference" and (self.gradient or callable(self.scale)):
            raise ValueError(f"potential {self.potential!r} takes neither a gradient nor a scale that varies; use 'difference'")

    def at(self, t: float) -> float:
        """The scale at time t."""
        return float(self.scale(t) if callable(self.scale) else self.scale)


@dataclass(frozen=True, eq=False)
class Target:
    r"""The law $p_t(x) \propto \prod_i q_{i,t}(x)^{g_i}\, e^{s\,r}$ over named model branches i, with $G = \sum_i g_i > 0$.

    All branches must share one noise schedule. Exponents may be negative where the product still has a finite integral, which
    nobody can check for a network; and they may be functions of the noise schedule's time t.

    Attributes:
        exponents: branch name -> g.
        reward: the tilt, or None.
    """

    exponents: Mapping[str, Exponent]
    reward: Reward | None = None

    def __post_init__(self) -> None:
        """Check.

        Raises:
            ValueError: no branches, exponents that are not finite, or constant exponents whose sum is not positive.
        """
        if not isinstance(self.exponents, Mapping) or not self.exponents:
            raise ValueError(f"exponents must map branch names to numbers, got {self.exponents!r}")
        for name, g in self.exponents.items():
            if not callable(g) and not (isinstance(g, int | float) and math.isfinite(g)):
                raise ValueError(f"the exponent of {name!r} must be a finite number or a function of t, got {g!r}")
        object.__setattr__(self, "exponents", {k: g if callable(g) else float(g) for k, g in self.exponents.items()})
        if not self.scheduled:
            _positive(sum(self.exponents.values()))  # type: ignore[arg-type]

    # ---- the usual ones --------------------------------------------------------------------------------------------

    @classmethod
    def cfg(cls, w: Exponent, interval: tuple[float, float] | None = None) -> Target:
        r"""What classifier-free guidance names: $q(x)^{1-w} q(x|c)^w$, branches "uncond" and "cond".

        Args:
            w: guidance scale, or a function of t.
            interval: guide only at times in [low, high] of the noise schedule's t; plain conditional elsewhere
                (Kynkäänniemi et al. 2024, arXiv:2404.07724).
        """
        return cls(_mix("uncond", "cond", w, interval))

    @classmethod
    def autoguidance(cls, w: Exponent) -> Target:
        r"""$q_{weak}^{1-w} q^w$, branches "weak" and "model" (Karras et al. 2024, arXiv:2406.02507)."""
        return cls(_mix("weak", "model", w, None))

    @classmethod
    def power(cls, beta: Exponent) -> Target:
        r"""Annealing: $q^\beta$, branch "model"."""
        return cls({"model": beta})

    @classmethod
    def guided_power(cls, w: float, beta: float) -> Target:
        r"""Guidance with annealing: $(q(x)^{1-w} q(x|c)^w)^\beta$, branches "uncond" and "cond"."""
        return cls({"uncond": beta * (1 - w), "cond": beta * w})

    @classmethod
    def product(cls, *names: str, beta: float = 1.0) -> Target:
        r"""Product of experts: $(\prod_i q_i)^\beta$ over the named branches."""
        if not names:
            raise ValueError("a product needs at least one branch name")
        return cls(dict.fromkeys(names, beta))

    @classmethod
    def compose(cls, **exponents: Exponent) -> Target:
        r"""Any exponents by branch name, as in ``compose(uncond=1-w1-w2, first=w1, second=w2)``.

        Exponents that sum to 1 are the ones to compose prompts with: their weights contain differences of branches only,
        while any other sum brings the annealing term, whose variance grows with the dimension.
        """
        return cls(exponents)

    @classmethod
    def parse(cls, text: str) -> Target:
        """A target from command-line text: ``cfg:2.0``, or ``model`` for the model's own law (to be tilted by a reward).

        Raises:
            ValueError: anything else, naming what is known.
        """
        kind, _, value = text.partition(":")
        try:
            if kind == "cfg":
                return cls.cfg(float(value))
            if kind == "power":
                return cls.power(float(value))
        except ValueError as error:
            raise ValueError(f"target {text!r}: {error}") from None
        if text == "model":
            return cls.power(1.0)
        raise ValueError(f"unknown target {text!r}; known: cfg:W, power:BETA, model")

    def with_reward(
        self,
        fn: RewardFunction,
        scale: Exponent = 1.0,
        *,
        potential: str = "difference",
        gradient: bool = False,
        every: int = 1,
    ) -> Target:
        """This target tilted by exp(scale * fn(x0)); see `Reward`."""
        return replace(self, reward=Reward(fn, scale, potential, gradient, every))

    # ---- values ----------------------------------------------------------------------------------------------------

    @property
    def scheduled(self) -> bool:
        """Whether an exponent varies with time."""
        return any(callable(g) for g in self.exponents.values())

    @property
    def branches(self) -> tuple[str, ...]:
        """The branches that matter: those whose exponent is not the constant 0."""
        return tuple(name for name, g in self.exponents.items() if callable(g) or g != 0.0)

    def at(self, t: float) -> tuple[float, ...]:
        """The exponents of `branches` at time t.

        Raises:
            ValueError: they are not finite, or their sum is not positive.
        """
        values = tuple(float(g(t) if callable(g) else g) for g in (self.exponents[name] for name in self.branches))
        if not all(map(math.isfinite, values)):
            raise ValueError(f"exponents {dict(zip(self.branches, values, strict=True))} at t = {t:g} are not finite")
        _positive(sum(values))
        return values


def _positive(total: float) -> None:
    if not total > 0:
        raise ValueError(f"the exponents must have a positive sum, got {total:g}: no such law starts from Gaussian noise")


def _mix(first: str, second: str, w: Exponent, interval: tuple[float, float] | None) -> dict[str, Exponent]:
    if interval is None and not callable(w):
        return {first: 1.0 - w, second: w}
    low, high = (0.0, math.inf) if interval is None else interval
    if not 0 <= low < high:
        raise ValueError(f"a guidance interval is (low, high) with 0 <= low < high, got {interval}")

    def scale(t: float) -> float:
        return _value(w, t) if low <= t <= high else 1.0

    return {first: lambda t: 1.0 - scale(t), second: scale}


def _value(g: Exponent, t: float) -> float:
    return float(g(t) if callable(g) else g)

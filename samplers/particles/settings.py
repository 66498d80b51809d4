"""The settings of a Feynman-Kac corrector."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .cloud import Rules
from .resampling import SCHEMES
from .targets import Target


@dataclass(frozen=True, eq=False)
class Settings:
    """What a corrector does, checked when it is made.

    Attributes:
        target: the law to sample.
        resampling: scheme, see `resample`.
        ess: resample when the effective sample size falls below this share of K: 0 never, 1 whenever weights differ.
        noise: the multiplier of the path's noise, >= 0: 0 is the probability-flow ODE, 1 the reverse SDE, more adds Langevin
            motion. The weights do not depend on it. With 0, copies that resampling makes never separate.
        resample_window: half-open range of the steps, as fractions, in which resampling may happen; (0, 0) never.
        weight_window: steps whose weights count. Anything but (0, 1) is another law than the target, to be seen as a heuristic.
        clip: bound on a step's centred log-weight increments; bends the law, off by default, its share is in the trace.
        temper: share of K that one step must leave of the effective sample size, by applying a part of its increment;
            likewise.

    Raises:
        ValueError: a value outside its range, naming it.
    """

    target: Target
    resampling: str = "systematic"
    ess: float = 0.5
    noise: float = 1.0
    resample_window: tuple[float, float] = (0.0, 1.0)
    weight_window: tuple[float, float] = (0.0, 1.0)
    clip: float | None = None
    temper: float | None = None

    def __post_init__(self) -> None:
        """Check."""
        if not isinstance(self.target, Target):
            raise ValueError(f"target must be a Target, such as Target.cfg(2.0), got {self.target!r}")
        if self.resampling not in SCHEMES:
            raise ValueError(f"unknown resampling scheme {self.resampling!r}; known: {', '.join(SCHEMES)}")
        if not 0 <= self.ess <= 1:
            raise ValueError(f"ess is a share of the particles, 0 to 1, got {self.ess}")
        if not (0 <= self.noise < math.inf):
            raise ValueError(f"noise multiplies the path's noise and must be finite and >= 0, got {self.noise}")
        for name in ("resample_window", "weight_window"):
            low, high = getattr(self, name)
            if not 0 <= low <= high <= 1:
                raise ValueError(f"{name} is a half-open range of fractions 0 <= low <= high <= 1, got {(low, high)}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be > 0, or None for exact weights, got {self.clip}")
        if self.temper is not None and not 0 < self.temper <= 1:
            raise ValueError(f"temper is a share of the particles, above 0 to 1, or None for exact weights, got {self.temper}")

    @property
    def rules(self) -> Rules:
        """How a `Population` treats its weights."""
        return Rules(self.resampling, self.ess, self.clip, self.temper)

    def resamples(self, step: int, steps: int) -> bool:
        """Whether step ``step`` of ``steps`` lies in the resampling window."""
        return self.resample_window[0] <= step / steps < self.resample_window[1]

    def weighs(self, step: int, steps: int) -> bool:
        """Whether its weight counts."""
        return self.weight_window[0] <= step / steps < self.weight_window[1]

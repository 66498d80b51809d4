"""Numbers without bounds <-> a table: what the optimisers move."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from samplers.discrete import DiscreteTable, transition

LOG_TEMP = (-1.4, 2.1)  # exponents from 0.25 to 8: further out a network is not to be trusted
REMASK_START = -4.0  # logit of the first remasking probability, 1.8 %


@dataclass(frozen=True)
class KnobSpace:
    """The family of tables that share a base transition and differ in the named knobs.

    The vector holds, knob by knob: ``t`` M logits of the step widths; ``rate`` and ``temp`` the logarithms of M - 1 and M
    numbers; ``count`` M logits of the shares of ``seq_len`` tokens; ``unmask`` and ``remask`` M - 1 logits. The first
    vector is the plain sampler (but for remask, whose logits cannot say zero).

    Attributes:
        process: "masked" or "uniform".
        base: text of the base transition.
        nfe: network evaluations.
        seq_len: sequence length.
        knobs: which numbers are free.
    """

    process: str
    base: str
    nfe: int
    seq_len: int
    knobs: tuple[str, ...]
    plain: DiscreteTable = field(init=False)

    def __post_init__(self) -> None:
        """Check the names; build the plain table."""
        object.__setattr__(self, "plain", DiscreteTable.plain(self.process, self.base, self.nfe))
        allowed = [k for k in ("t", *transition(self.base).knobs) if self.process == "masked" or k not in MASKED_ONLY]
        if not self.knobs or any(knob not in allowed for knob in self.knobs):
            raise ValueError(
                f"{self.base} on the {self.process} process can learn {', '.join(allowed)}; got {list(self.knobs)}"
            )
        if len(set(self.knobs)) < len(self.knobs):
            raise ValueError(f"a knob is named twice: {list(self.knobs)}")

    @property
    def sizes(self) -> dict[str, int]:
        """Length of each knob's part of the vector."""
        steps = self.plain.steps
        return {knob: steps - 1 if knob in ("rate", "unmask", "remask") else steps for knob in self.knobs}

    @property
    def dimension(self) -> int:
        """Length of the vector."""
        return sum(self.sizes.values())

    def start(self) -> Tensor:
        """The vector of the plain sampler, float64."""
        parts, steps = [], self.plain.steps
        for knob, size in self.sizes.items():
            if knob == "unmask":  # 1 / (M - k): as many tokens at every step
                parts.append(torch.tensor([-math.log(steps - k - 1.0) for k in range(size)], dtype=torch.float64))
            elif knob == "remask":
                parts.append(torch.full((size,), REMASK_START, dtype=torch.float64))
            else:
                parts.append(torch.zeros(size, dtype=torch.float64))
        return torch.cat(parts)

    def table(self, vector: Tensor, provenance: dict[str, Any] | None = None) -> DiscreteTable:
        """The table of a vector; its numbers are 0-d tensors, differentiable in ``vector``."""
        parts = dict(zip(self.sizes, vector.split(list(self.sizes.values())), strict=True))
        one, zero = vector.new_ones(1), vector.new_zeros(1)
        times: Sequence[Any] = self.plain.times
        numbers: dict[str, Any] = {}
        for knob, part in parts.items():
            if knob == "t":
                widths = part.clamp(-12.0, 12.0).softmax(0)
                times = [1.0, *(1.0 - widths.cumsum(0)[:-1]).unbind(), 0.0]
            elif knob == "rate":
                numbers[knob] = torch.cat([part.clamp(-6.0, 6.0).exp(), one]).unbind()
            elif knob == "temp":
                numbers[knob] = part.clamp(*LOG_TEMP).exp().unbind()
            elif knob == "count":
                numbers[knob] = (self.seq_len * part.clamp(-12.0, 12.0).softmax(0)).unbind()
            elif knob == "unmask":
                numbers[knob] = torch.cat([part.sigmoid(), one]).unbind()
            else:
                numbers[knob] = torch.cat([part.sigmoid(), zero]).unbind()
        return DiscreteTable(self.process, self.plain.transition, tuple(times), **numbers, provenance=provenance or {})

    def numbers(self, vector: Tensor, provenance: dict[str, Any] | None = None) -> DiscreteTable:
        """The table of a vector as plain numbers, rounded to nine digits, checked."""
        data = self.table(vector.detach(), provenance).to_dict()
        for knob, values in data.items():
            if isinstance(values, list) and knob != "times":
                data[knob] = [float(f"{value:.9g}") for value in values]
        return DiscreteTable.from_dict(data)


MASKED_ONLY = ("count", "unmask", "remask")


def default_spaces(process: str, nfe: int, seq_len: int, *, sampled: bool) -> list[KnobSpace]:
    """The families worth trying: all are fitted, the best on fresh noise is kept."""
    if process == "uniform":
        rates = ("t", "rate") if sampled else ("t", "rate", "temp")  # a gradient is not troubled by more numbers, a search is
        choices = [("euler", rates), ("tweedie", ("t", "temp"))]
    elif sampled:
        choices = [("fixed_count", ("count", "temp"))]
    else:
        choices = [("tweedie", ("unmask", "temp")), ("fixed_count", ("count", "temp"))]
    return [KnobSpace(process, base, nfe, seq_len, knobs) for base, knobs in choices]

r"""The score-matching objectives of LSD and LSD+ (Fu et al. 2025, arXiv:2509.19962, eq. 5-10), as printed. Experimental.

Teacher (N Euler steps) and student (M) start from the same noise and run with their own randomness; step k's number is fitted
so that the student's score $s$ at its own state matches the teacher's $s^*$ at the teacher's. States are integers and draws are
not differentiated, so every squared loss is a regression with the closed form $\langle s^*, s\rangle / \langle s, s\rangle$.

The two runs are independent given the start, so the regression is attenuated: its minimiser shrinks every coefficient after
the first below one. For LSD+ as printed the right side carries the teacher's step, so the steps shrink to the teacher's.
``block`` compares the transition mass over the student's whole step instead, which repairs the scale, not the attenuation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from samplers.discrete import DiscreteTable, Model, Process, iterate_discrete

from .knobs import KnobSpace


@dataclass(frozen=True)
class ScoreFit:
    """Settings.

    Attributes:
        block: compare transition mass over the student's step, not scores at its start.
        teacher_nfe: N, rounded up to a multiple of M.
        samples: sequences per round.
        rounds: how often both are rolled; each round's regression replaces half of the running one.
        relax: share of sites of the student's start that are redrawn (the paper's Hamming threshold, 0.05 there).
        seed: of all rolls.
    """

    block: bool = False
    teacher_nfe: int = 128
    samples: int = 500
    rounds: int = 8
    relax: float = 0.0
    seed: int = 0


def fit_score(
    space: KnobSpace,
    model: Model,
    process: Process,
    config: ScoreFit,
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int, float], None] | None = None,
) -> DiscreteTable:
    """The table of LSD (knobs ``rate``), of LSD+ (``t``), or of both in turn (``t`` and ``rate``).

    Warns:
        UserWarning: LSD+ covered less than half of the time axis before its last step.

    Raises:
        ValueError: knobs other than t and rate, another base than Euler, or settings out of range.
    """
    if not set(space.knobs) <= {"t", "rate"} or not space.base.startswith("euler"):
        raise ValueError(f"score objectives fit t and rate of the euler base, got {list(space.knobs)} of {space.base}")
    if not 0.0 <= config.relax < 1.0 or config.rounds < 1 or config.samples < 1:
        raise ValueError(f"need 0 <= relax < 1 and positive rounds and samples, got {config}")
    steps = space.plain.steps
    fine = -(-config.teacher_nfe // steps) * steps
    teacher = DiscreteTable.plain(process.name, space.base, fine)
    phi = torch.ones(steps, dtype=torch.float64)
    kappa = torch.full((steps,), 1.0 / steps, dtype=torch.float64)
    generator = torch.Generator().manual_seed(config.seed)
    for turn in range(config.rounds):
        table = _table(space, phi, kappa)
        start = process.prior((config.samples, space.seq_len), generator, device=torch.device(device))
        with torch.no_grad():
            given = _redrawn(start, process, config.relax, generator)
            goal = _scores(model, process, start, teacher, fine // steps, config.block, generator)
            mine = _scores(model, process, given, table, 1, config.block, generator)
        ratio = torch.stack([_regress(g, m) for g, m in zip(goal, mine, strict=True)])
        both = len(space.knobs) == 2  # then the knobs take turns
        if "t" in space.knobs and not (both and turn % 2):
            # block: mass over the teacher's block / rate of the student, a width; printed: (1 / N) s* against kappa s
            kappa = 0.5 * (kappa + ratio / fine)
        if "rate" in space.knobs and not (both and turn % 2 == 0):
            widths = -torch.tensor([float(t) for t in table.times], dtype=torch.float64).diff()
            phi = 0.5 * (phi + (ratio / fine / widths if config.block else ratio))
        if progress:
            progress(turn + 1, config.rounds, float(ratio.mean()))
    covered = float(kappa[:-1].sum()) + float(kappa[-1])
    if "t" in space.knobs and covered < 0.5:
        warnings.warn(
            f"the steps of LSD+ cover {covered:.3f} of the time axis: the objective shrinks them to the teacher's; "
            "use exact_kl, ngram_kl or mmd",
            stacklevel=2,
        )
    return DiscreteTable.from_dict(_table(space, phi, kappa, {"covered": covered}).to_dict())


def _table(space: KnobSpace, phi: Tensor, kappa: Tensor, provenance: dict | None = None) -> DiscreteTable:
    """Times after the learned steps (scaled down where they pass 0), the rest left to the last, posterior step."""
    kappa = kappa.clamp(min=1e-6)
    total = float(kappa.sum())
    times = 1.0 - (kappa / max(1.0, total)).cumsum(0)[:-1]
    rate = [max(float(p), 0.0) for p in phi[:-1]] + [1.0] if "rate" in space.knobs else None
    numbers = {"rate": tuple(rate)} if rate else {}
    plain = space.plain.times if "t" not in space.knobs else (1.0, *times.tolist(), 0.0)
    return DiscreteTable(
        process=space.process, transition=space.plain.transition, times=plain, provenance=provenance or {}, **numbers
    )


def _redrawn(x: Tensor, process: Process, share: float, generator: torch.Generator) -> Tensor:
    """Ids with a fixed number of random sites per row redrawn over the data tokens."""
    count = int(share * x.shape[1])
    if count == 0:
        return x
    order = torch.rand(x.shape, generator=generator).to(x.device).argsort(-1)
    tokens = torch.randint(process.vocab, x.shape, generator=generator).to(x.device)
    return torch.where(order < count, tokens, x)


def _scores(
    model: Model, process: Process, x: Tensor, table: DiscreteTable, stride: int, block: bool, generator: torch.Generator
) -> list[Tensor]:
    """Off-diagonal scores (n, L, S) at every ``stride``-th query, times the rate and summed over the stride for ``block``."""
    found: list[Tensor] = []

    def noted(ids: Tensor, t: Tensor) -> Tensor:
        probs = model(ids, t)
        rates = process.reverse_rates(process.settle(probs, ids), ids, t)
        index = noted.calls
        noted.calls += 1
        if block:
            if index % stride == 0:
                found.append(rates)
            else:
                found[-1] = found[-1] + rates
        elif index % stride == 0:
            unit = process.schedule.rate(t) / (1 if process.name == "masked" else process.vocab)
            found.append(rates / unit)
        return probs

    noted.calls = 0
    for _ in iterate_discrete(noted, process, x, table, generator=generator):
        pass
    return found


def _regress(goal: Tensor, mine: Tensor) -> Tensor:
    """Coefficient of the least-squares line through zero."""
    return ((goal * mine).double().sum() / (mine * mine).double().sum().clamp(min=1e-300)).cpu()

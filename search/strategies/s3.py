"""S3: evaluate, fit a predictor, evolve against it, evaluate what it likes; repeat with tighter moves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from samplers import SolverSchedule

from ..predictor import Predictor
from ..space import SearchSpace
from .proposals import Proposer

ELITE, CHILDREN, GENERATIONS = 6, 96, 2
PLAIN = 0.25  # of a stage goes past the predictor, twice as much at the end
FIRST_FIT = 12  # trials before the predictor is asked
CROSSOVER, SPREAD = 0.35, 0.8  # share of children with two parents; of the logarithm of a child's scale


class S3Proposer(Proposer):
    """Predictor-based multi-stage search (arXiv:2312.07243, section 4).

    A stage fits the predictor on all trials, evolves children of the best under it, and queues the children that its members
    rank first. A quarter of a stage, later half of it, goes past the predictor: plain mutations of the very best, which also
    keep its training data honest. Moves tighten as the budget is spent.

    Attributes:
        history: per stage: trials known, Kendall's tau on held-out trials, scale of the moves.
    """

    def __init__(self, space: SearchSpace, *, budget: int, seed: int = 0, stage: int | None = None) -> None:
        """Set up.

        Args:
            space: the schedules.
            budget: trials that the search will make; sets the stages' length.
            seed: of the predictor.
            stage: proposals a stage; None takes a sixteenth of the budget, 3 to 16.
        """
        self.space = space
        self.stage = stage or int(np.clip(budget // 16, 3, 16))
        self.predictor = Predictor(space.noise_schedule, final_time=space.final_time, seed=seed)
        self.queue: list[SolverSchedule] = []
        self.history: list[dict[str, float]] = []

    def propose(
        self, pool: Sequence[tuple[float, SolverSchedule]], rng: np.random.Generator, progress: float
    ) -> SolverSchedule:
        """The next of the stage's proposals; a new stage when there are none left."""
        if not self.queue:
            self.queue = self._new_stage(pool, rng, progress)
        return self.queue.pop(0)

    def _new_stage(
        self, pool: Sequence[tuple[float, SolverSchedule]], rng: np.random.Generator, progress: float
    ) -> list[SolverSchedule]:
        if len(pool) < 2:
            return [self.space.random(rng)]
        scale = 0.15 ** min(progress, 1.0)
        elite = [schedule for _, schedule in pool[:ELITE]]
        if len(pool) < FIRST_FIT:
            return [self._child(elite, rng, scale)]
        values = [value for value, _ in pool]
        tau = self.predictor.fit([s for _, s in pool], values, epochs=40 if self.predictor.fitted else 100)
        self.history.append({"trials": len(pool), "tau": tau, "scale": scale})
        plain = max(round(self.stage * (PLAIN + PLAIN * progress)), 1)
        chosen = [self.space.mutate(elite[i % min(3, len(elite))], rng, scale) for i in range(plain)]
        return self._evolved(elite, rng, scale, self.stage - plain) + chosen

    def _evolved(
        self, elite: Sequence[SolverSchedule], rng: np.random.Generator, scale: float, wanted: int
    ) -> list[SolverSchedule]:
        """The children that the predictor's members rank first, each member naming some: its doubts make the variety."""
        parents, found = list(elite), {}
        for _ in range(GENERATIONS):
            for child in (self._child(parents, rng, scale) for _ in range(CHILDREN)):
                found[child.digest] = child
            children = list(found.values())
            scores = self.predictor.scores(children)
            best = np.argsort(scores.mean(0))[: len(elite)]
            parents = [*elite[: len(elite) // 2], *(children[i] for i in best)]
        orders = [iter(np.argsort(row)) for row in scores]
        picked: dict[str, SolverSchedule] = {}
        while len(picked) < min(wanted, len(children)):
            for order in orders:
                choice = next((children[i] for i in order if children[i].digest not in picked), None)
                if choice is not None and len(picked) < wanted:
                    picked[choice.digest] = choice
        return list(picked.values())

    def _child(self, parents: Sequence[SolverSchedule], rng: np.random.Generator, scale: float) -> SolverSchedule:
        """Better parents have more children."""
        i = min(int(rng.exponential(len(parents) / 3)), len(parents) - 1)
        child = parents[i]
        if len(parents) > 1 and rng.random() < CROSSOVER:
            child = self.space.cross(child, parents[int(rng.integers(len(parents)))], rng)
        return self.space.mutate(child, rng, scale * float(np.exp(SPREAD * rng.standard_normal())))

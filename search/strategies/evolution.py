"""The published loop: parents from the best few, crossover now and then, mutation always, one child at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from samplers import SolverSchedule

from ..space import SearchSpace
from .proposals import Proposer

PARENTS, CROSSOVER = 15, 0.3


class EvolutionProposer(Proposer):
    """Steady-state evolution as in the code published with arXiv:2312.07243.

    There, a process repeats: two parents uniformly from the 15 best with this number of evaluations, crossover with probability
    0.3, mutation of the child, evaluation. Mutation rates are constant.
    """

    def __init__(self, space: SearchSpace) -> None:
        """Remember the space."""
        self.space = space

    def propose(
        self, pool: Sequence[tuple[float, SolverSchedule]], rng: np.random.Generator, progress: float
    ) -> SolverSchedule:
        """A mutated child of one or two of the best."""
        if not pool:
            return self.space.random(rng)
        best = [schedule for _, schedule in pool[:PARENTS]]
        child = best[int(rng.integers(len(best)))]
        if rng.random() < CROSSOVER:
            child = self.space.cross(child, best[int(rng.integers(len(best)))], rng)
        return self.space.mutate(child, rng)

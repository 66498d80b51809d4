"""The whole way from a model to a schedule file: search, re-rank, refine, score on held-out noises, name the baselines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from samplers import SolverSchedule

from .ledger import Ledger, storage_url
from .objective import Objective
from .refine import Refined, refine
from .selection import Score, best_of_each_kind, classics, first_of_each_kind, ranked, score, with_provenance
from .space import SearchSpace
from .study import SearchResult, run_search

FINALISTS = 10
STARTS = 16  # best classic solvers that the search starts from


def rounds_in_all(refine_rounds: int) -> int:
    """Rounds of a whole `find_schedule`: from each of three starts, then from the best of them."""
    return 3 * _first_rounds(refine_rounds) + refine_rounds


def _first_rounds(refine_rounds: int) -> int:
    return -(-refine_rounds // 3)


@dataclass(frozen=True)
class Found:
    """A schedule with what is known about it.

    Attributes:
        schedule: with provenance, ready to be saved.
        test: its score on the third set of noises.
        searched: score there of the search's own best, before refinement.
        baselines: scores there of the best classic solvers, by "plain" and "analytic" (first step).
        gap: RMSE of the found schedule on the noises it was searched on, on those that selected it, and on the test's.
        result: of the search.
        refined: of the refinement, or None.
    """

    schedule: SolverSchedule
    test: Score
    searched: Score
    baselines: dict[str, Score]
    gap: dict[str, float]
    result: SearchResult
    refined: Refined | None

    @property
    def ratio(self) -> float:
        """Test error over the best baseline's."""
        return self.test.value / min(score.value for score in self.baselines.values())


def find_schedule(
    space: SearchSpace,
    train: Objective,
    validation: Objective,
    test: Objective,
    *,
    name: str,
    trials: int = 200,
    strategy: str = "s3",
    storage: str | None = None,
    seed: int = 0,
    refine_rounds: int = 6,
    difference: float | None = None,
    rankers: Sequence[Callable[[SolverSchedule], float]] = (),
    warm_start: Sequence[SolverSchedule] = (),
    baseline_limit: int | None = None,
    facts: Mapping[str, Any] | None = None,
    progress: Callable[..., None] | None = None,
    say: Callable[[str], None] = lambda text: None,
    study_name: str | None = None,
) -> Found:
    """Search on one set of noises, select on a second, report on a third.

    Args:
        space: the schedules.
        train: endpoint objective that is searched and descended on.
        validation: on fresh noises; re-ranks the best `FINALISTS` and stops the refinement.
        test: on noises that no choice depends on.
        name: of the schedule.
        trials: COMPLETE trials.
        strategy: see `run_search`.
        storage: likewise.
        seed: likewise.
        refine_rounds: rounds of `refine` after the search, and a third as many from each start before; 0 for none.
        difference: see `refine`.
        rankers: further objectives on the validation's side, as a distribution distance.
        warm_start: see `run_search`.
        baseline_limit: compare with, and start from, the first baselines of the list only.
        facts: about the model, for the provenance.
        progress: see `run_search`.
        say: called with what begins.
        study_name: see `run_search`.
    """
    say("baselines")
    ledger = Ledger(None if storage is None else storage_url(storage))
    known = classics(space, train, limit=baseline_limit, ledger=ledger)
    ledger.close()
    say("search")
    first = [*warm_start, *(classic.schedule for classic in known[:STARTS])]
    result = run_search(
        space, train, strategy, trials, storage, seed,
        study_name=study_name, warm_start=first, seeds=len(first), progress=progress,
    )  # fmt: skip
    say("re-rank")
    judges = [validation, *rankers]
    finalists = [record.schedule for record in result.top(FINALISTS)]
    searched = ranked(finalists, judges)[0]
    chosen, refined = searched, None
    if refine_rounds:
        # From where the search ended and from the best classic ones: what is best before need not be best after.
        starts = {s.digest: s for s in (searched, *(space.adopt(c.schedule) for c in first_of_each_kind(known).values()))}
        tried = []
        for k, start in enumerate(starts.values()):
            say(f"refine, start {k + 1} of {len(starts)}")
            tried.append(refine(start, space, train, validation, rounds=_first_rounds(refine_rounds), difference=difference))
        say("refine, the best")
        halfway = min(tried, key=lambda r: r.value)
        refined = refine(halfway.schedule, space, train, validation, rounds=refine_rounds, difference=difference)
        chosen = ranked([refined.schedule, halfway.schedule, searched], judges)[0]
    say("scores")
    baselines = best_of_each_kind(known, test)
    held_out = score(chosen, test, name)
    gap = {"train": train(chosen), "validation": validation(chosen), "test": held_out.value}
    provenance = {
        **(facts or {}),
        "found_by": {
            "strategy": strategy,
            "trials": len(result.trials),
            "seed": seed,
            "objective": train.settings,
            "refine_rounds": refine_rounds,
            "selected_on": {"noises": len(validation.x_T), "finalists": len(finalists)},
        },
        "scores": {
            "metric": "RMSE to the converged solution, held-out noises",
            "noises": len(test.x_T),
            "found": held_out.to_dict(),
            "baselines": {kind: value.to_dict() for kind, value in baselines.items()},
            "train_validation_test": gap,
            "reference_error": test.reference_error,
        },
    }
    shipped = with_provenance(chosen, name, provenance)
    return Found(shipped, held_out, score(searched, test, "searched"), baselines, gap, result, refined)

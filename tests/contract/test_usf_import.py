"""The reader of published USF dicts: what it maps, what it refuses, what it warns about."""

import copy

import pytest

from samplers import Corrector, Evaluation, SolverSchedule, StepStrategy


def _difference(*points: int, relaxation=None, coefficient: float = 0.0) -> dict:
    return {
        "estimate": f"Difference_{len(points)}",
        "active_points": list(points),
        "relaxation": relaxation,
        "relaxation_coefficient": coefficient,
    }


MAPPING = {
    "timesteps": [80.0, 10.0, 1.0, 0.002],
    "afs": "average_x0",
    "orders": [1, 2, 3],
    "start_points": [-1, -1, -1],
    "prediction_types": ["noise_prediction", "data_prediction", "noise_prediction"],
    "derivative_types": [
        [],
        [_difference(-2, relaxation="linear", coefficient=-0.25)],
        [_difference(-2, relaxation="unipc-bh1"), _difference(-3, -2)],
    ],
    "corrector_types": [
        {"type": "pseudo", "taylor_order": 2, "derivative_type": [_difference(-1)]},
        {"type": "implicit", "taylor_order": 3, "derivative_type": [_difference(-1), _difference(-1, -3)]},
        {"type": "no_corrector"},
    ],
}


def _changed(**changes) -> dict:
    return {**copy.deepcopy(MAPPING), **changes}


def test_every_field_is_mapped() -> None:
    schedule = SolverSchedule.from_usf(MAPPING)
    assert schedule.times == (80.0, 10.0, 1.0, 0.002)
    assert schedule.nfe == 3 - 1 + 1  # one analytic, one re-evaluated
    assert schedule.steps == (
        StepStrategy(
            pred="eps",
            nodes=(),
            corr=Corrector(order=2, nodes=(-1,), d_nodes=((-1,),), relax=(None,)),
            eval=Evaluation(source="average_x0"),
        ),
        StepStrategy(
            order=2,
            nodes=(-2,),
            d_nodes=((-2,),),
            relax=(-0.25,),
            corr=Corrector(order=3, nodes=(-1, -3), d_nodes=((-1,), (-1, -3)), relax=(None, None), reeval=True),
        ),
        StepStrategy(order=3, pred="eps", nodes=(-3, -2), d_nodes=((-2,), (-3, -2)), relax=("bh1", None)),
    )


@pytest.mark.parametrize(
    ("name", "relax"),
    [
        (None, None),
        ("no_relaxation", None),
        ("linear", 0.5),
        ("unipc-bh1", "bh1"),
        ("unipc-bh2", "bh2"),
        ("dpmsolver-2", "bh2"),
        ("0.5exp", "exp+"),
        ("-0.5exp", "exp-"),
    ],
)
def test_relaxation_names(name: str | None, relax: float | str | None) -> None:
    types = copy.deepcopy(MAPPING["derivative_types"])
    types[1] = [_difference(-2, relaxation=name, coefficient=0.5)]
    assert SolverSchedule.from_usf(_changed(derivative_types=types)).steps[1].relax == (relax,)


@pytest.mark.parametrize(("afs", "source"), [("no_afs", "model"), ("zero_x0", "zero_x0"), ("average_x0", "average_x0")])
def test_analytic_first_steps(afs: str, source: str) -> None:
    assert SolverSchedule.from_usf(_changed(afs=afs)).steps[0].eval.source == source


def test_skip_factors_belong_to_the_format_and_not_to_the_solver() -> None:
    """They are kept as a fact for those who apply them to the network."""
    schedule, plain = SolverSchedule.from_usf(_changed(skip_coefficients=[0.9] * 15)), SolverSchedule.from_usf(MAPPING)
    assert schedule.steps == plain.steps
    assert schedule.digest == plain.digest
    assert schedule.provenance == {**plain.provenance, "skip_coefficients": [0.9] * 15}


def test_the_third_prediction_type_reads_statistics_at_their_nodes() -> None:
    schedule = SolverSchedule.from_usf(_changed(prediction_types=["dpmsolver_v3_prediction"] * 3))
    assert [step.pred for step in schedule.steps] == ["v3-nodes"] * 3


def test_other_keys_are_ignored_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="ignored keys fid, seed"):
        schedule = SolverSchedule.from_usf(_changed(seed=1, fid=2.0))
    assert schedule == SolverSchedule.from_usf(MAPPING)


@pytest.mark.parametrize("key", list(MAPPING))
def test_missing_keys_are_named(key: str) -> None:
    mapping = _changed()
    del mapping[key]
    with pytest.raises(ValueError, match=f"not a USF schedule: missing {key}"):
        SolverSchedule.from_usf(mapping)


@pytest.mark.parametrize("key", ["orders", "start_points", "prediction_types", "derivative_types", "corrector_types"])
def test_lists_agree_in_length(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} has 2 entries for 3 steps"):
        SolverSchedule.from_usf(_changed(**{key: MAPPING[key][:2]}))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"afs": "yes"}, "unknown afs 'yes'; known: no_afs, zero_x0, average_x0"),
        ({"prediction_types": ["v"] * 3}, "unknown prediction type 'v'; known: noise_prediction, data_prediction"),
        ({"orders": [1, 1, 3]}, "order 1 needs 0 derivative types, got 1"),
        ({"start_points": [-1, -3, -1]}, r"steps\[1\]: start -3 is outside"),
        ({"timesteps": [1.0, 10.0, 2.0, 0.1]}, "times must strictly"),
        ({"derivative_types": [[], [_difference(-2, relaxation="cubic")], MAPPING["derivative_types"][2]]}, "'cubic'"),
        ({"derivative_types": [[], [_difference(-4)], MAPPING["derivative_types"][2]]}, r"steps\[1\]: node -4"),
        ({"corrector_types": [{"type": "full"}, *MAPPING["corrector_types"][1:]]}, "unknown corrector 'full'; known: no_"),
        ({"corrector_types": [MAPPING["corrector_types"][0]] * 3}, r"steps\[2\]: a corrector needs"),
    ],
)
def test_bad_values_are_refused(changes: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        SolverSchedule.from_usf(_changed(**changes))

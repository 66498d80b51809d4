"""Solver schedules refuse what cannot be run, at construction, naming the step and the reason."""

import json
import math

import pytest

from samplers import Corrector, Evaluation, Noise, Residual, SolverSchedule, StepStrategy

S = StepStrategy


def _schedule(*steps: StepStrategy, **options) -> SolverSchedule:
    n = len(steps)
    return SolverSchedule(times=tuple(1 - i / (n + 1) for i in range(n + 1)), steps=steps, **options)


def _mapping(**changes) -> dict:
    return {**_schedule(S(), S(order=2)).to_dict(), **changes}


# ---- JSON ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"stpes": []}, "unknown field `stpes`"),
        ({"steps": [{"ordr": 1}, {}]}, r"unknown field `ordr` - at `\$.steps\[0\]`"),
        ({"steps": [{"corr": {"order": 2, "kind": 1}}, {}]}, r"unknown field `kind` - at `\$.steps\[0\].corr`"),
        ({"steps": [{"eval": {"shift": 1}}, {}]}, r"unknown field `shift` - at `\$.steps\[0\].eval`"),
        ({"steps": [{}, {"delta": {"y": [1]}}]}, r"unknown field `y` - at `\$.steps\[1\].delta`"),
        ({"steps": [{"corr": {}}, {}]}, r"missing required field `order` - at `\$.steps\[0\].corr`"),
        ({"defaults": {"ordr": 2}}, "unknown field `ordr`"),
        ({"defaults": 3}, "defaults must be an object"),
        ({"nfe": 3}, "says nfe 3, its steps make 2"),
        ({"format": "solver-schedule/0"}, "format is 'solver-schedule/0', expected 'solver-schedule/1'"),
        ({"format": None}, "not a solver schedule"),
        ({"times": "1,0"}, r"Expected `array`, got `str` - at `\$.times`"),
        ({"times": [1, "a", 0]}, r"Expected `float`, got `str` - at `\$.times\[1\]`"),
        ({"times": [1, None, 0]}, r"got `null` - at `\$.times\[1\]`"),
        ({"steps": [{"order": 1.5}, {}]}, r"Expected `int`, got `float` - at `\$.steps\[0\].order`"),
        ({"steps": [{"order": True}, {}]}, r"got `bool` - at `\$.steps\[0\].order`"),
        ({"steps": [{"order": "2"}, {}]}, r"got `str` - at `\$.steps\[0\].order`"),
        ({"steps": [3, {}]}, r"Expected `object`, got `int` - at `\$.steps\[0\]`"),
        ({"steps": {}}, r"Expected `array`, got `object`"),
        ({"steps": [{"pred": "v"}, {}]}, r"'v' - at `\$.steps\[0\].pred`"),
        ({"steps": [{"pred": [1.0]}, {}]}, r"length 2, got 1 - at `\$.steps\[0\].pred`"),
        ({"steps": [{"axis": "time"}, {}]}, r"'time' - at `\$.steps\[0\].axis`"),
        ({"steps": [{}, {"order": 2, "relax": ["bh3"]}]}, r"'bh3' - at `\$.steps\[1\].relax\[0\]`"),
        ({"steps": [{}, {"order": 3}]}, r"steps\[1\]: derivative 2 needs 2 nodes"),
        ({"clip": -1}, "clip must be positive"),
        ({"clip": "yes"}, r"'yes' - at `\$.clip`"),
    ],
)
def test_json_errors_say_where(changes: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        SolverSchedule.from_dict(_mapping(**changes))


@pytest.mark.parametrize("key", ["times", "steps", "format"])
def test_required_keys(key: str) -> None:
    mapping = _mapping()
    del mapping[key]
    with pytest.raises(ValueError, match=key):
        SolverSchedule.from_dict(mapping)


def test_nfe_may_be_left_out_and_whole_numbers_are_numbers() -> None:
    mapping = _mapping(times=[3, 2, 1], clip=1)
    del mapping["nfe"]
    schedule = SolverSchedule.from_dict(mapping)
    same = SolverSchedule(times=(3, 2, 1), steps=(S(), S(order=2)), clip=1)
    assert schedule == same
    assert schedule.digest == same.digest
    assert {type(t) for t in same.times} == {float}


@pytest.mark.parametrize("pair", [(1, 0), (0, -1)])
def test_whole_numbers_in_steps_do_not_change_the_digest(pair: tuple[int, int]) -> None:
    steps = (S(pred=pair), S(order=2, relax=(1,), delta=Residual(x0=(1,))))
    schedule = _schedule(*steps)
    assert SolverSchedule.from_dict(json.loads(json.dumps(schedule.to_dict()))).digest == schedule.digest


# ---- times ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("times", "reason"),
    [
        ((1.0, 0.5, 0.6), r"strictly decrease: times\[1\] = 0.5 and times\[2\] = 0.6"),
        ((1.0, 1.0, 0.5), r"strictly decrease: times\[0\] = 1 and times\[1\] = 1"),
        ((0.1, 0.5, 0.4), r"strictly increase: times\[1\] = 0.5 and times\[2\] = 0.4"),
        ((0.5, 0.7, 0.5), "strictly"),
        ((1.0, math.nan, 0.5), r"times\[1\] is nan"),
        ((math.inf, 1.0, 0.5), r"times\[0\] is inf"),
        ((1.0, 0.5), "one more time than steps.* got 2 and 2"),
        ((1.0, 0.5, 0.2, 0.1), "one more time than steps.* got 4 and 2"),
    ],
)
def test_times_out_of_order(times: tuple[float, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        SolverSchedule(times=times, steps=(S(), S()))


def test_a_schedule_has_a_step() -> None:
    with pytest.raises(ValueError, match="at least one step"):
        SolverSchedule(times=(1.0,), steps=())


# ---- steps ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ((S(order=0),), r"steps\[0\]: order must be 1..4, got 0"),
        ((S(order=5),), r"steps\[0\]: order must be 1..4, got 5"),
        ((S(order=2),), r"steps\[0\]: derivative 1 needs 1 nodes besides the start, but has 0"),
        ((S(), S(order=3)), r"steps\[1\]: derivative 2 needs 2 nodes besides the start, but has 1"),
        ((S(), S(order=2, nodes=())), r"steps\[1\]: derivative 1 needs 1 nodes"),
        ((S(start=-2),), r"steps\[0\]: start -2 is outside the history, which holds nodes -1..-1"),
        ((S(), S(start=0)), r"steps\[1\]: start 0 is outside"),
        ((S(), S(order=2, nodes=(-3,))), r"steps\[1\]: node -3 is outside the history, which holds nodes -2..-1"),
        ((S(), S(order=2, nodes=(0,))), r"steps\[1\]: node 0 is outside"),
        ((S(), S(order=2, nodes=(-1,))), r"steps\[1\]: derivative 1 names a node twice or the start itself"),
        ((S(), S(), S(order=2, nodes=(-2, -2))), r"steps\[2\]: derivative 1 names a node twice"),
        ((S(), S(order=2, start=-2, nodes=(-2,))), r"steps\[1\]: .* the start itself"),
        ((S(), S(order=2, d_nodes=(0,))), r"steps\[1\]: d_nodes\[0\] must name at least one node, got 0"),
        ((S(), S(), S(order=3, d_nodes=(None, 1))), r"steps\[2\]: derivative 2 needs 2 nodes"),
        ((S(), S(order=2, d_nodes=((-3,),))), r"steps\[1\]: node -3 is outside"),
        ((S(), S(order=2, d_nodes=(1, 1))), r"steps\[1\]: order 2 has 1 derivatives, but d_nodes or relax names more"),
        ((S(), S(order=2, relax=(0.1, 0.1))), r"steps\[1\]: order 2 has 1 derivatives"),
        ((S(), S(order=2, relax=("bh3",))), r"steps\[1\]: unknown relaxation 'bh3'"),
        ((S(), S(order=2, relax=(math.nan,))), r"steps\[1\]: relaxation of derivative 1 is nan"),
        ((S(), S(order=2, relax=(math.inf,))), r"steps\[1\]: relaxation of derivative 1 is inf"),
        ((S(pred="v"),), r"steps\[0\]: unknown pred 'v'; known: x0, eps"),
        ((S(axis="log"),), r"steps\[0\]: unknown axis 'log'; known: lambda, sigma, t, index"),
        ((S(pred=(0.5, 0.0), axis="t"),), r"steps\[0\]: pred \(l, r\) is defined on axis 'lambda' only, got 't'"),
        ((S(pred=(math.nan, 0.0)),), r"steps\[0\]: pred and delta must be finite"),
        ((S(delta=Residual(x=(math.inf,))),), r"steps\[0\]: pred and delta must be finite"),
        ((S(delta=Residual(x=(0.1, 0.2))),), r"steps\[0\]: delta names more nodes than the 1 in the history"),
        ((S(), S(delta=Residual(x0=(0.1,) * 3))), r"steps\[1\]: delta names more nodes than the 2"),
        ((S(eval=Evaluation(source="mean")),), r"steps\[0\]: unknown source 'mean'; known: model, zero_x0, average_x0"),
        ((S(), S(eval=Evaluation(source="zero_x0"))), r"steps\[1\]: source 'zero_x0' is analytic and only possible at"),
    ],
)
def test_steps_their_history_cannot_serve(steps: tuple[StepStrategy, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        _schedule(*steps)


@pytest.mark.parametrize(
    ("corr", "reason"),
    [
        (Corrector(order=1), r"steps\[0\]: corrector order must be 2..5, got 1"),
        (Corrector(order=6), r"steps\[0\]: corrector order must be 2..5, got 6"),
        (Corrector(order=3), r"steps\[0\]: corrector: derivative 2 needs 2 nodes besides the start, but has 1"),
        (Corrector(order=2, nodes=(-2,)), r"steps\[0\]: corrector: .* the start itself"),
        (Corrector(order=2, nodes=(-3,)), r"steps\[0\]: corrector: node -3 is outside the history, which holds nodes -2..-1"),
        (Corrector(order=2, relax=("no",)), r"steps\[0\]: corrector: unknown relaxation 'no'"),
    ],
)
def test_correctors_their_history_cannot_serve(corr: Corrector, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        _schedule(S(corr=corr), S())


def test_the_last_step_has_no_corrector() -> None:
    with pytest.raises(ValueError, match=r"steps\[1\]: a corrector needs a network evaluation at the step's end"):
        _schedule(S(), S(corr=Corrector(order=2)))


@pytest.mark.parametrize("clip", [0, -0.5, math.nan])
def test_clip_is_positive(clip: float) -> None:
    with pytest.raises(ValueError, match="clip must be positive"):
        _schedule(S(), clip=clip)


# ---- facts -----------------------------------------------------------------------------------------------


def test_nfe_counts_evaluations() -> None:
    plain = (S(), S(), S())
    assert _schedule(*plain).nfe == 3
    assert _schedule(S(eval=Evaluation(source="zero_x0")), *plain[1:]).nfe == 2
    assert _schedule(S(corr=Corrector(order=2)), *plain[1:]).nfe == 3
    assert _schedule(S(corr=Corrector(order=2, reeval=True)), *plain[1:]).nfe == 4


def test_schedules_are_frozen() -> None:
    schedule = _schedule(S())
    with pytest.raises(AttributeError):
        schedule.times = (2.0, 1.0)
    with pytest.raises(AttributeError):
        schedule.steps[0].order = 2


def test_cutting_off_history_drops_what_named_it() -> None:
    """Even a node that is named and then not used: it could not be named from the shorter history."""
    corr = Corrector(order=2, nodes=(-1, -3), d_nodes=((-1,),))
    tail = _schedule(S(), S(corr=corr), S(order=2, nodes=(-2, -3), d_nodes=((-2,),)), S(order=2)).tail(1)
    assert tail.steps == (S(), S(), S(order=2))
    kept = _schedule(S(), S(corr=Corrector(order=2)), S(order=2)).tail(1)
    assert kept.steps == (S(corr=Corrector(order=2)), S(order=2))


def test_a_tail_warms_up_as_its_schedule_does() -> None:
    """With the orders of the schedule's own first steps, their correctors, and the noise of the steps that are replaced."""
    later = S(order=3, corr=Corrector(order=4), noise=Noise(amount=0.5))
    first = (S(corr=Corrector(order=2)), S(order=2, relax=("bh2",), corr=Corrector(order=3)))
    tail = _schedule(*first, *[later] * 5, S(order=3)).tail(3)
    assert [step.order for step in tail.steps] == [1, 2, 3, 3, 3]
    assert [step.corr.order for step in tail.steps if step.corr is not None] == [2, 3, 4, 4]
    assert tail.steps[1].relax == ("bh2",)
    assert [step.noise for step in tail.steps] == [later.noise] * 4 + [None]


@pytest.mark.parametrize("first", [S(pred="eps"), S(axis="t"), S(corr=Corrector(order=2)), S(keep_eps=True)])
def test_a_tail_does_not_begin_with_a_step_of_another_kind(first: StepStrategy) -> None:
    tail = _schedule(first, *[S(order=2)] * 4).tail(2)
    assert tail.steps == (S(), S(order=2), S(order=2))

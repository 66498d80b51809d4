"""Schedules as data: the JSON form, the digest, cutting, and the tableau's bookkeeping."""

import copy
import json
import math
import random

import msgspec
import torch
from hypothesis import given
from hypothesis import strategies as st

from samplers import NoiseSchedule, SolverSchedule, StepStrategy, Tableau
from samplers.testing import random_schedule

NOISE = (NoiseSchedule.vp_linear(), NoiseSchedule.vp_cosine(), NoiseSchedule.edm(), NoiseSchedule.flow())
MEAN = torch.zeros(2, dtype=torch.float64)

Case = tuple[SolverSchedule, NoiseSchedule]


def _make(seed: int) -> Case:
    rng = random.Random(seed)
    noise = rng.choice(NOISE)
    return random_schedule(rng, noise, max_steps=8, deltas=True, clips=True), noise


cases = st.integers(0, 2**32).map(_make)


@given(cases)
def test_json_round_trip_is_the_identity(case: Case) -> None:
    schedule, _ = case
    again = SolverSchedule.from_dict(json.loads(json.dumps(schedule.to_dict(), allow_nan=False)))
    assert again == schedule
    assert again.to_dict() == schedule.to_dict()
    assert again.digest == schedule.digest


@given(cases)
def test_the_file_round_trip_is_the_identity(tmp_path_factory, case: Case) -> None:
    path = tmp_path_factory.mktemp("schedules") / "schedule.json"
    case[0].save(path)
    assert SolverSchedule.load(path) == case[0]
    assert SolverSchedule.load(str(path)) == case[0]


@given(cases)
def test_reading_does_not_change_what_was_read(case: Case) -> None:
    mapping = case[0].to_dict()
    before = copy.deepcopy(mapping)
    SolverSchedule.from_dict(mapping)
    assert mapping == before


@given(cases, st.integers(0, 7))
def test_the_digest_is_of_the_numbers_only(case: Case, where: int) -> None:
    schedule, _ = case
    renamed = msgspec.structs.replace(schedule, name="other", path=None, provenance={"by": "hand"})
    assert renamed.digest == schedule.digest
    times = list(schedule.times)
    where = min(where, len(times) - 2)
    times[where] = math.nextafter(times[where], times[where + 1])
    assert msgspec.structs.replace(schedule, times=tuple(times)).digest != schedule.digest


@given(cases)
def test_every_random_schedule_compiles_to_finite_rows_that_read_what_is_kept(case: Case) -> None:
    schedule, noise = case
    tableau = Tableau.build(schedule, noise, first_x0=MEAN)
    known = {"x0", "first_x0"}
    for row in tableau.opening:
        assert known >= {name for name, _ in row.terms}
        known.add(row.target)
    for stage in tableau.stages:
        assert stage.query.state in known
        known |= {stage.query.output} | ({stage.raw} if stage.raw else set())
        for row in stage.rows:
            assert known >= {name for name, _ in row.terms}
            assert all(math.isfinite(c) for _, c in row.terms)
            known.add(row.target)
        known &= stage.keep | {"first_x0"}
    assert tableau.result in known


@given(cases, st.integers(0, 7))
def test_a_tail_is_a_valid_schedule_with_the_same_end(case: Case, where: int) -> None:
    schedule, noise = case
    where = min(where, len(schedule.steps) - 1)
    tail = schedule.tail(where)
    assert tail.times == schedule.times[where:]
    assert len(tail.steps) == len(schedule.steps) - where
    assert where > 0 or tail == schedule
    for j, (own, original) in enumerate(zip(tail.steps, schedule.steps[where:], strict=True)):
        if own in (original, msgspec.structs.replace(original, corr=None)):
            here, there = tail.stencil(j), schedule.stencil(where + j)
            assert here.start + where == there.start
            assert [[n + where for n in d[0]] for d in here.derivatives] == [list(d[0]) for d in there.derivatives]
        else:
            assert own.order == 1
    Tableau.build(tail, noise, first_x0=MEAN)


@given(cases)
def test_defaults_are_inherited_by_every_step(case: Case) -> None:
    schedule, _ = case
    mapping = schedule.to_dict()
    mapping["defaults"] = {"keep_eps": True, "axis": "lambda"}
    read = SolverSchedule.from_dict(mapping)
    for step, original in zip(read.steps, mapping["steps"], strict=True):
        assert step.keep_eps == original.get("keep_eps", True)
        assert step == msgspec.structs.replace(msgspec.convert(original, StepStrategy), keep_eps=step.keep_eps)

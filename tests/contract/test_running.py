"""What compiling and running refuse, with one clear line, before the network is called where that is possible."""

import math

import pytest
import torch
from torch import Tensor

from samplers import Corrector, Engine, Evaluation, NoiseSchedule, SolverSchedule, StepStrategy, Tableau, recipe, sample

VP, COSINE, EDM, FLOW = NoiseSchedule.vp_linear(), NoiseSchedule.vp_cosine(), NoiseSchedule.edm(), NoiseSchedule.flow()
S = StepStrategy
AVERAGE = S(eval=Evaluation(source="average_x0"))
X = torch.ones(2, 3)


def _never(x: Tensor, t: Tensor) -> Tensor:
    raise AssertionError("the network was called")


# ---- placement -----------------------------------------------------------------------------------------------------

TO_ZERO, FROM_NOISE, FROM_DATA = (1.0, 0.5, 0.0), (1.0, 0.5, 0.2), (0.0, 0.5, 0.7)


@pytest.mark.parametrize(
    ("noise", "times", "steps", "reason"),
    [
        (VP, TO_ZERO, (S(), S(order=2)), r"steps\[1\]: order 2 with pred 'x0' cannot end at sigma = 0"),
        (FLOW, TO_ZERO, (S(), S(order=2, axis="t")), r"steps\[1\]: order 2 with pred 'x0' cannot end at sigma = 0"),
        (VP, TO_ZERO, (S(), S(order=2, axis="index")), r"steps\[1\]: order 2 .* use order 1 or pred 'eps' there"),
        (VP, TO_ZERO, (S(), S(order=2, pred="eps", relax=(0.1,))), r"steps\[1\] ends at sigma = 0.*0.1 depends on h"),
        (VP, TO_ZERO, (S(), S(order=2, pred="eps", relax=("bh2",))), r"steps\[1\] ends at sigma = 0.*'bh2' depends on"),
        (VP, TO_ZERO, (S(), S(pred=(0.5, 0.0))), r"steps\[1\] ends at sigma = 0, .*pred \(0.5, 0.0\) is not defined"),
        (FLOW, FROM_NOISE, (S(pred=(0.5, 0.0)), S()), r"steps\[0\] starts at alpha = 0, .*pred \(0.5, 0.0\)"),
        (COSINE, FROM_NOISE, (S(pred=(0.5, 0.0), corr=Corrector(order=2)), S()), r"steps\[0\] starts at alpha = 0"),
        (FLOW, FROM_NOISE, (S(), S(order=2, pred=(0.5, 0.0))), r"steps\[1\]: pred \(0.5, 0.0\) is not defined at its"),
        (FLOW, FROM_NOISE, (S(), S(order=2, pred="eps", axis="index", start=-2)), r"steps\[1\]: pred 'eps' on axis 'index'"),
        (VP, FROM_DATA, (S(), S()), r"steps\[0\] starts at sigma = 0, where x0 is already known"),
        (VP, FROM_DATA, (S(pred=(0.5, 0.0)), S()), r"steps\[0\] starts at sigma = 0"),
        (VP, (1.1, 0.5, 0.2), (S(), S()), r"time 1.1 is outside \[0, 1\] of the vp_linear noise schedule"),
        (EDM, (80.1, 5.0, 0.2), (S(), S()), r"time 80.1 is outside \[0, 80\] of the edm noise schedule"),
        (VP, FROM_NOISE, (AVERAGE, S()), r"steps\[0\]: source 'average_x0' needs first_x0"),
    ],
)
def test_placement_errors_name_the_step(noise: NoiseSchedule, times, steps, reason: str) -> None:
    schedule = SolverSchedule(times=times, steps=steps)
    with pytest.raises(ValueError, match=reason):
        Tableau.build(schedule, noise)
    with pytest.raises(ValueError, match=reason):
        sample(_never, X, schedule, noise)


@pytest.mark.parametrize("step", [S(order=2, pred="eps"), S(order=2, pred="eps", relax=("half",)), S(), S(pred="eps")])
def test_what_may_end_at_sigma_zero(step: StepStrategy) -> None:
    tableau = Tableau.build(SolverSchedule(times=TO_ZERO, steps=(S(), step)), VP)
    assert all(math.isfinite(c) for stage in tableau.stages for row in stage.rows for _, c in row.terms)


@pytest.mark.parametrize("noise", [VP, EDM, FLOW], ids=lambda noise: noise.kind)
def test_a_schedule_of_another_family_is_refused(noise: NoiseSchedule) -> None:
    for other in {VP, EDM, FLOW} - {noise}:
        schedule = recipe("ddim", other, 3)
        with pytest.raises(ValueError, match=f"times belong to '{other.kind}', not to the '{noise.kind}'"):
            sample(_never, X, schedule, noise)
    unbound = SolverSchedule(times=(0.9, 0.5), steps=(S(),))
    assert Tableau.build(unbound, noise).nfe == 1


def test_a_schedule_of_the_same_family_is_accepted() -> None:
    schedule = recipe("ddim", VP, 3)
    assert Tableau.build(schedule, COSINE).nfe == 3
    assert Tableau.build(schedule, NoiseSchedule.vp_linear(0.2, 15.0)).nfe == 3


def test_a_path_that_is_no_family_is_refused() -> None:
    with pytest.raises(ValueError, match="belong to '3'"):
        Tableau.build(SolverSchedule(times=(0.9, 0.5), steps=(S(),), path={"type": 3}), VP)


# ---- inputs of sample ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (torch.ones(2, 3, dtype=torch.int64), "x must be a floating-point tensor .* got torch.int64"),
        (torch.ones(2, 3, dtype=torch.complex64), "got torch.complex64"),
        ([[1.0, 2.0]], "got list"),
        (None, "got NoneType"),
        (torch.tensor(1.0), "x must have a batch dimension, got a 0-d tensor"),
    ],
)
def test_bad_states_are_refused_before_any_call(x, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        sample(_never, x, recipe("ddim", VP, 3), VP)


@pytest.mark.parametrize("shape", [(2,), (1, 3), (2, 3), ()])
def test_a_mean_of_another_shape_is_refused_before_any_call(shape: tuple[int, ...]) -> None:
    schedule = recipe("ddim:afs=average_x0", VP, 3)
    with pytest.raises(ValueError, match=r"first_x0 has shape .*, the state \(3,\)"):
        sample(_never, X, schedule, VP, first_x0=torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 3), (2, 1), (2, 3, 1), (3,)])
def test_a_denoiser_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"the denoiser returned shape .* for a state of shape \(2, 3\)"):
        sample(lambda x, t: torch.zeros(shape), X, recipe("ddim", VP, 3), VP)


# ---- the engine ----------------------------------------------------------------------------------------------------


def test_the_engine_ends() -> None:
    engine = Engine(Tableau.build(recipe("unipc:order=2", VP, 3), VP), X)
    times = []
    while engine.query is not None:
        times.append(engine.query.t.item())
        engine.tell(torch.zeros_like(engine.x))
    assert times == list(recipe("unipc:order=2", VP, 3).times[:-1])
    assert engine.x.shape == X.shape
    with pytest.raises(RuntimeError, match="all 3 network evaluations are done; start a new run"):
        engine.tell(torch.zeros_like(X))


def test_the_engine_forgets_what_no_row_reads() -> None:
    engine = Engine(Tableau.build(recipe("unipc:order=3", VP, 12), VP), X)
    held = []
    while engine.query is not None:
        engine.tell(torch.zeros_like(engine.x))
        held.append(len(engine.memory))
    assert max(held) <= 5  # the state, and what a third-order step with its corrector looks back to
    assert set(engine.memory) == {"x12"}


def test_the_engine_does_not_write_into_the_callers_tensors() -> None:
    x, before = X.clone(), X.clone()
    engine = Engine(Tableau.build(recipe("unipc:order=3", VP, 4), VP), x)
    while engine.query is not None:
        answer = torch.full_like(engine.x, 0.5)
        engine.tell(answer)
        assert torch.equal(answer, torch.full_like(answer, 0.5))
    assert torch.equal(x, before)


def test_told_clips_are_applied() -> None:
    tableau = Tableau.build(SolverSchedule(times=(0.9, 0.0), steps=(S(),)), VP)
    engine = Engine(tableau, X, clip=lambda x0: x0.clamp(-0.1, 0.1))
    engine.tell(torch.full_like(X, 5.0))
    assert torch.allclose(engine.x, torch.full_like(X, 0.1))


def test_a_branch_goes_on_alone() -> None:
    """A branch ends where its own run would; the run it left is not touched."""
    tableau = Tableau.build(recipe("unipc:order=3", VP, 5), VP)
    engine, halfway = Engine(tableau, X), []
    while engine.query is not None:
        if engine.position == 3:
            halfway.append(engine.branch(tableau))
        engine.tell(0.5 * engine.x)
    alone = Engine(tableau, X)
    while alone.query is not None:
        alone.tell(0.5 * alone.x)
    other = halfway[0]
    assert other.position == 3
    while other.query is not None:
        other.tell(0.5 * other.x)
    assert torch.equal(engine.x, alone.x)
    assert torch.equal(other.x, alone.x)


def test_a_branch_needs_the_same_memory() -> None:
    engine = Engine(Tableau.build(recipe("ddim", VP, 5), VP), X)
    for _ in range(3):
        engine.tell(0.5 * engine.x)
    with pytest.raises(ValueError, match="the tableau would need"):
        engine.branch(Tableau.build(recipe("deis:order=3", VP, 5), VP))

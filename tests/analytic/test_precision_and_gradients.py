"""Dtypes of runs, clipping, and the differentiable tableau."""

import msgspec
import pytest
import torch
from torch import Tensor

from samplers import Corrector, NoiseSchedule, Residual, SolverSchedule, StepStrategy, Tableau, recipe, sample
from samplers.denoisers import GaussianMixture

VP, EDM, FLOW = NoiseSchedule.vp_linear(), NoiseSchedule.edm(), NoiseSchedule.flow()
FAMILIES = pytest.mark.parametrize("noise", [VP, EDM, FLOW], ids=lambda noise: noise.kind)
LAW = GaussianMixture(torch.tensor([[1.5, -0.5], [-1.0, 0.8]]), torch.tensor([0.3, 0.5]))
X = torch.randn(4, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_states_get_float32_arithmetic(dtype: torch.dtype) -> None:
    x, seen, schedule = X.to(dtype), [], recipe("unipc:order=3", VP, 8)

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x.dtype)
        return LAW.denoiser(VP)(x, t)

    result, states = sample(denoiser, x, schedule, VP, trajectory=True)
    assert set(seen) == {torch.float32}
    assert {state.dtype for state in states} == {dtype}
    assert torch.equal(result, sample(denoiser, x.float(), schedule, VP).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_states_dtype_is_kept(dtype: torch.dtype) -> None:
    result = sample(LAW.denoiser(VP), X.to(dtype), recipe("deis:order=3", VP, 8), VP)
    assert result.dtype == dtype
    torch.testing.assert_close(
        result.double(), sample(LAW.denoiser(VP), X, recipe("deis:order=3", VP, 8), VP), rtol=1e-4, atol=1e-4
    )


def test_a_number_clips_every_prediction() -> None:
    schedule = recipe("dpmpp:order=2,clip=0.5", VP, 5)
    clipped = sample(lambda x, t: LAW.denoiser(VP)(x, t).clamp(-0.5, 0.5), X, recipe("dpmpp:order=2", VP, 5), VP)
    assert torch.equal(sample(LAW.denoiser(VP), X, schedule, VP), clipped)
    whole = msgspec.structs.replace(schedule, clip=1)
    assert sample(LAW.denoiser(VP), 3 * X, whole, VP).abs().max() <= 1


def test_keep_eps_uses_the_unclipped_noise() -> None:
    """As in-tree DDIM: x0 clipped, eps from before."""
    times, steps = (0.8, 0.4), (StepStrategy(keep_eps=True),)
    schedule = SolverSchedule(times=times, steps=steps, clip=0.1)
    raw = LAW.denoiser(VP)(X, torch.tensor(0.8, dtype=torch.float64))
    assert raw.abs().max() > 0.2
    (alpha, sigma), (alpha_to, sigma_to) = (VP.alpha_sigma(t) for t in times)
    expected = alpha_to * raw.clamp(-0.1, 0.1) + sigma_to * (X - alpha * raw) / sigma
    torch.testing.assert_close(sample(LAW.denoiser(VP), X, schedule, VP), expected, rtol=1e-12, atol=1e-12)


# ---- gradients -----------------------------------------------------------------------------------------------------

STEPS = {
    "ddim": (StepStrategy(),) * 3,
    "2m": (StepStrategy(), StepStrategy(order=2, relax=("bh2",)), StepStrategy(order=2)),
    "taylor eps": (StepStrategy(pred="eps"), StepStrategy(order=2, pred="eps"), StepStrategy(order=3, pred="eps")),
    "unipc": (
        StepStrategy(corr=Corrector(order=2, relax=("bh1",))),
        StepStrategy(order=2, relax=(0.2,), corr=Corrector(order=3)),
        StepStrategy(order=3, relax=(None, "half")),
    ),
    "sigma": (StepStrategy(), StepStrategy(order=2, axis="sigma"), StepStrategy(order=3, axis="sigma", pred="eps")),
    "t": (StepStrategy(), StepStrategy(order=2, axis="t"), StepStrategy(order=3, axis="t", pred="eps")),
    "index": (StepStrategy(), StepStrategy(order=2, axis="index"), StepStrategy(order=3, axis="index", pred="eps")),
    "pair": (StepStrategy(), StepStrategy(order=2, pred=(0.5, -0.3)), StepStrategy(order=3, pred=(0.5, 0.2))),
    "restart": (StepStrategy(), StepStrategy(order=2, start=-2), StepStrategy(order=2, start=-3)),
}


def _times(noise: NoiseSchedule) -> Tensor:
    return noise.t_of_lam(torch.tensor([-2.0, -0.4, 0.7, 1.9], dtype=torch.float64))


@FAMILIES
@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
def test_gradients_in_the_times(noise: NoiseSchedule, steps: tuple[StepStrategy, ...]) -> None:
    def run(times: Tensor) -> Tensor:
        return sample(LAW.denoiser(noise), X, SolverSchedule(times=tuple(times.unbind()), steps=steps), noise)

    times = _times(noise).requires_grad_()
    assert torch.autograd.gradcheck(run, times, eps=1e-6, atol=1e-5, rtol=1e-4)
    plain = SolverSchedule(times=tuple(times.tolist()), steps=steps)
    torch.testing.assert_close(run(times), sample(LAW.denoiser(noise), X, plain, noise), rtol=1e-12, atol=1e-12)


@FAMILIES
def test_gradients_in_the_coefficients(noise: NoiseSchedule) -> None:
    times = tuple(_times(noise).tolist())

    def run(c: Tensor) -> Tensor:
        steps = (
            StepStrategy(corr=Corrector(order=2, relax=(c[0],))),
            StepStrategy(order=2, relax=(c[1],), delta=Residual(x=(c[2],), x0=(c[3], c[4]))),
            StepStrategy(order=2, pred=(c[5], c[6])),
        )
        return sample(LAW.denoiser(noise), X, SolverSchedule(times=times, steps=steps), noise)

    c = torch.tensor([0.1, -0.2, 0.05, 0.1, -0.1, 0.7, -0.2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, c, eps=1e-6, atol=1e-6, rtol=1e-5)


def test_gradients_through_a_float32_state() -> None:
    times = _times(VP).requires_grad_()
    schedule = SolverSchedule(times=tuple(times.unbind()), steps=STEPS["2m"])
    result = sample(LAW.denoiser(VP), X.float(), schedule, VP)
    assert result.dtype == torch.float32
    (gradient,) = torch.autograd.grad(result.sum(), times)
    assert bool((gradient != 0).all())


# ---- the compiled form ---------------------------------------------------------------------------------------------


def test_compiling_twice_is_cached_by_what_decides_the_numbers() -> None:
    schedule = recipe("unipc:order=3", VP, 6)
    first = Tableau.build(schedule, VP)
    assert Tableau.build(msgspec.structs.replace(schedule, name="other"), VP).stages is first.stages
    assert Tableau.build(schedule, NoiseSchedule.vp_linear(0.1, 19.0)).stages is not first.stages
    other = msgspec.structs.replace(schedule, steps=(StepStrategy(pred="eps"), *schedule.steps[1:]))
    assert Tableau.build(other, VP).stages is not first.stages


def test_rows_hold_plain_floats_and_a_compiled_tableau_runs() -> None:
    schedule = recipe("unipc:order=3", VP, 6)
    tableau = Tableau.build(schedule, VP)
    assert tableau.nfe == 6
    assert all(type(c) is float for stage in tableau.stages for row in stage.rows for _, c in row.terms)
    assert torch.equal(sample(LAW.denoiser(VP), X, tableau, VP), sample(LAW.denoiser(VP), X, schedule, VP))

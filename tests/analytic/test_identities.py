"""Identities between solvers (arXiv:2312.07243, arXiv:2302.04867): different strategies, the same numbers."""

import msgspec
import pytest
import torch
from torch import Tensor

from samplers import Corrector, Engine, NoiseSchedule, SolverSchedule, StepStrategy, Tableau, recipe, sample
from samplers.denoisers import GaussianMixture

NOISE = {
    "vp": NoiseSchedule.vp_linear(),
    "cosine": NoiseSchedule.vp_cosine(),
    "edm": NoiseSchedule.edm(),
    "flow": NoiseSchedule.flow(),
}
ALL = pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)
LAMBDAS = (-2.0, -1.1, -0.6, 0.2, 0.9, 2.1, 2.6)  # uneven on purpose
LAW = GaussianMixture(
    torch.tensor([[1.0, -0.5], [-1.5, 0.3], [0.2, 2.0]]), torch.tensor([0.3, 0.6, 0.2]), torch.tensor([0.5, 0.3, 0.2])
)


def _times(noise: NoiseSchedule, n: int = 6) -> tuple[float, ...]:
    return tuple(noise.t_of_lam(torch.tensor(LAMBDAS[: n + 1], dtype=torch.float64)).tolist())


def _x() -> Tensor:
    return torch.tensor([[0.4, -1.0], [1.7, 0.2], [-0.6, 0.9]], dtype=torch.float64)


def _run(noise: NoiseSchedule, steps) -> Tensor:
    steps = tuple(steps)
    schedule = SolverSchedule(times=_times(noise, len(steps)), steps=steps)
    return sample(LAW.denoiser(noise), _x() * noise.sigma(schedule.times[0]), schedule, noise)


def _same(noise: NoiseSchedule, first, second) -> None:
    torch.testing.assert_close(_run(noise, first), _run(noise, second), rtol=1e-11, atol=1e-12)


def _different(noise: NoiseSchedule, first, second) -> None:
    assert (_run(noise, first) - _run(noise, second)).abs().max() > 1e-5


def _warm(order: int, n: int = 6, **options) -> list[StepStrategy]:
    return [StepStrategy(order=min(order, i + 1), **options) for i in range(n)]


@ALL
def test_2m_is_unip_2_with_bh2(noise: NoiseSchedule) -> None:
    unipc = recipe("unipc:order=2,variant=bh2,corrector=false,lower_order_final=false,final=sigma_min", noise, 6).steps
    dpmpp = recipe("dpmpp:order=2,lower_order_final=false,final=sigma_min", noise, 6).steps
    _same(noise, unipc, dpmpp)
    bh1 = recipe("unipc:order=2,variant=bh1,corrector=false,lower_order_final=false,final=sigma_min", noise, 6).steps
    _different(noise, unipc, bh1)


@ALL
def test_unic_1_is_halfway_with_its_own_b(noise: NoiseSchedule) -> None:
    """UniPC's first corrector adds (B(h) / 2) (M_new - M_start), not the Taylor weight (arXiv:2302.04867, section 3.3)."""
    denoiser = LAW.denoiser(noise)
    for variant in ("bh1", "bh2"):
        step = recipe(f"unipc:order=1,variant={variant}", noise, 6).steps[0]
        corr = msgspec.structs.replace(step.corr, reeval=True)
        schedule = SolverSchedule(times=_times(noise, 2), steps=(msgspec.structs.replace(step, corr=corr), StepStrategy()))
        engine = Engine(Tableau.build(schedule, noise), _x())
        first = denoiser(engine.x, engine.query.t)
        engine.tell(first)
        predicted, second = engine.x, denoiser(engine.x, engine.query.t)
        engine.tell(second)
        h = torch.tensor(LAMBDAS[1] - LAMBDAS[0], dtype=torch.float64)
        half = 0.5 * (h if variant == "bh1" else -torch.expm1(-h))
        expected = predicted + noise.alpha(schedule.times[1]) * half * (second - first)
        torch.testing.assert_close(engine.x, expected, rtol=1e-11, atol=1e-12)


@ALL
@pytest.mark.parametrize("order", [3, 4])
@pytest.mark.parametrize("pred", ["x0", "eps"])
def test_from_order_3_unip_is_the_taylor_step(noise: NoiseSchedule, order: int, pred: str) -> None:
    bh1, bh2 = (
        list(recipe(f"unipc:order={order},variant={v},pred={pred},lower_order_final=false,final=sigma_min", noise, 6).steps)
        for v in ("bh1", "bh2")
    )
    warm = [StepStrategy(pred=pred), StepStrategy(order=2, pred=pred)]
    _same(noise, [*warm, *bh1[2:]], [*warm, *bh2[2:]])
    plain = [msgspec.structs.replace(step, corr=None) for step in bh1]
    _same(noise, [*warm, *plain[2:]], [*warm, *_warm(order, pred=pred)[2:]])


@ALL
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("pred", ["x0", "eps"])
def test_unic_redoes_the_step_with_one_order_more(noise: NoiseSchedule, order: int, pred: str) -> None:
    """The corrected state is the step of order p + 1 from the previous node, the new point among its nodes."""
    times, denoiser, warm = _times(noise, order + 1), LAW.denoiser(noise), _warm(order, order)
    steps = [*warm, StepStrategy()]
    steps[order - 1] = StepStrategy(order=order, corr=Corrector(order=order + 1, reeval=True))
    steps = [msgspec.structs.replace(step, pred=pred) for step in steps]
    engine = Engine(Tableau.build(SolverSchedule(times=times, steps=tuple(steps)), noise), _x())
    while engine.query.node < order:
        engine.tell(denoiser(engine.x, engine.query.t))
    predicted = engine.x
    engine.tell(denoiser(predicted, engine.query.t))
    # From scratch: visit the new point, then restart from the node before it (times must fall: to a hair further).
    redo = [*warm, StepStrategy(order=order + 1, start=-2)]
    redo = [msgspec.structs.replace(step, pred=pred) for step in redo]
    beyond = times[-2] - 1e-13 * (times[-2] - times[-1])
    again = sample(denoiser, _x(), SolverSchedule(times=(*times[:-1], beyond), steps=tuple(redo)), noise)
    torch.testing.assert_close(engine.x, again, rtol=1e-9, atol=1e-10)
    assert (engine.x - predicted).abs().max() > 1e-5


@ALL
def test_the_first_order_step_is_the_same_for_every_prediction(noise: NoiseSchedule) -> None:
    _same(noise, _warm(1, pred="eps"), _warm(1, pred="x0"))
    _same(noise, _warm(1, pred="eps", axis="sigma"), _warm(1, pred="x0", axis="t"))
    _different(noise, _warm(2, pred="eps"), _warm(2, pred="x0"))


@ALL
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize(("pair", "name"), [((1.0, 0.0), "x0"), ((0.0, -1.0), "eps")])
def test_l_r_prediction_contains_both_ends(noise: NoiseSchedule, order: int, pair: tuple[float, float], name: str) -> None:
    _same(noise, _warm(order, pred=pair), _warm(order, pred=name))


@ALL
@pytest.mark.parametrize("order", [2, 3, 4])
def test_l_r_correctors_contain_both_ends(noise: NoiseSchedule, order: int) -> None:
    def steps(pred) -> list[StepStrategy]:
        warm = [StepStrategy(order=min(order, i + 1), pred=pred, corr=Corrector(order=min(order, i + 1) + 1)) for i in range(5)]
        return [*warm, StepStrategy(order=order, pred=pred)]

    _same(noise, steps((1.0, 0.0)), steps("x0"))
    _same(noise, steps((0.0, -1.0)), steps("eps"))

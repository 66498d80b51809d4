"""v3 steps: degenerate statistics are the other forms, and integrals of linear statistics are exact."""

import math
from itertools import pairwise

import msgspec
import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from samplers import Corrector, NoiseSchedule, SolverSchedule, StepStrategy, Tableau, parse_recipe, recipe, sample
from samplers.denoisers import GaussianMixture
from samplers.statistics import EmpiricalStatistics
from samplers.statistics.reading import LinearReading, NodeReading

SHAPE = (2, 3)
NOISE = {"vp": NoiseSchedule.vp_linear(), "edm": NoiseSchedule.edm(), "flow": NoiseSchedule.flow()}
TIMES = {
    "vp": (0.97, 0.8, 0.55, 0.3, 0.11, 0.004),
    "edm": (70.0, 20.0, 4.0, 0.9, 0.2, 0.01),
    "flow": (0.95, 0.8, 0.5, 0.3, 0.1, 0.01),
}
PLAN = (
    StepStrategy(corr=Corrector(order=2)),
    StepStrategy(order=2, relax=(0.2,), corr=Corrector(order=3)),
    StepStrategy(order=3, d_nodes=(1,)),
    StepStrategy(order=4, relax=(-0.1,)),
    StepStrategy(order=2, start=-2),
)


def _law() -> GaussianMixture:
    generator = torch.Generator().manual_seed(0)
    return GaussianMixture(torch.randn(3, 6, generator=generator).double(), torch.tensor([0.3, 0.5, 0.9]))


def _grid(noise: NoiseSchedule, times: tuple[float, ...], nodes: int = 40) -> Tensor:
    low, high = noise.lam(torch.tensor([times[0], times[-1]], dtype=torch.float64)).tolist()
    return torch.linspace(low, high, nodes + 1, dtype=torch.float64)


def _run(kind: str, pred: str, statistics: EmpiricalStatistics | None = None) -> Tensor:
    noise, x = NOISE[kind], torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(1)).double() * TIMES[kind][0]
    schedule = SolverSchedule(times=TIMES[kind], steps=tuple(msgspec.structs.replace(step, pred=pred) for step in PLAN))
    return sample(_law().denoiser(noise), x, schedule, noise, statistics=statistics)


@pytest.mark.parametrize("shape", [(), SHAPE], ids=["scalar", "tensor"])
@pytest.mark.parametrize(("form", "values"), [("x0", (1.0, 0.0)), ("eps", (0.0, -1.0))])
@pytest.mark.parametrize("kind", NOISE)
@pytest.mark.parametrize("pred", ["v3", "v3-nodes"])
def test_degenerate_statistics_are_the_data_and_the_noise_form(pred: str, kind: str, form: str, values, shape) -> None:
    lam = _grid(NOISE[kind], TIMES[kind])
    l, s = (torch.full((len(lam), *shape), value, dtype=torch.float64) for value in values)
    expected, found = _run(kind, form), _run(kind, pred, EmpiricalStatistics(lam, l, s, torch.zeros_like(l)))
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-10)


def test_constant_statistics_are_the_pair_prediction() -> None:
    lam = _grid(NOISE["vp"], TIMES["vp"])
    l, s = (torch.full((len(lam),), value, dtype=torch.float64) for value in (0.7, -0.4))
    noise, x = NOISE["vp"], torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plan = [
        SolverSchedule(times=TIMES["vp"], steps=tuple(msgspec.structs.replace(step, pred=pred) for step in PLAN))
        for pred in ((0.7, -0.4), "v3")
    ]
    statistics = EmpiricalStatistics(lam, l, s, torch.zeros_like(l))
    a, b = (sample(_law().denoiser(noise), x, schedule, noise, statistics=statistics) for schedule in plan)
    assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)


# ---- the recipe ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NOISE)
@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("dpm_v3:order=1,corrector=none", "dpmpp:order=1"),
        ("dpm_v3:order=2,corrector=none", "dpmpp:order=2,solver_type=heun"),
        (
            "dpm_v3:order=3,corrector=none",
            "dpmpp:order=3,solver_type=heun,taylor=true",
        ),
    ],
)
def test_with_data_statistics_the_recipe_is_dpm_solver_pp(text: str, same: str, kind: str) -> None:
    noise, x = NOISE[kind], torch.randn(5, 6, generator=torch.Generator().manual_seed(1)).double()
    lam = torch.linspace(-7.0, 8.0, 5, dtype=torch.float64)
    data = EmpiricalStatistics(lam, torch.ones(5), torch.zeros(5), torch.zeros(5))
    plans = [parse_recipe(f"{t},lower_order_final=false").schedule(noise, 5, at=TIMES[kind]) for t in (text, same)]
    a, b = (sample(_law().denoiser(noise), x, plan, noise, statistics=data) for plan in plans)
    assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)


def test_options_of_the_recipe() -> None:
    def steps(options: str, final: str = "sigma_min", nfe: int = 6) -> tuple[StepStrategy, ...]:
        return recipe(f"dpm_v3:grid=linspace,final={final}{options}", NOISE["vp"], nfe).steps

    plain = steps("")
    assert [step.order for step in plain] == [1, 2, 3, 3, 2, 1]
    assert [step.corr and step.corr.order for step in plain] == [2, 3, 4, 4, 3, None]
    assert plain[2].corr.d_nodes == (1, 2, 3)
    assert plain[2].d_nodes == ()
    assert [step.order for step in steps(",lower_order_final=false")] == [1, 2, 3, 3, 3, 3]
    assert steps(",pseudo=true")[2].d_nodes == (1, 2)
    assert [step.corr and step.corr.order for step in steps(",corrector=taylor")] == [None, 2, 3, 3, 2, None]
    times = recipe("dpm_v3:grid=linspace,half=true", NOISE["vp"], 6).times
    halved = [step.corr is not None for step in steps(",half=true")]
    assert halved == [t > 0.5 for t in times[1:]]
    assert 0 < sum(halved) < 5
    assert steps("", final="zero")[-1] == StepStrategy()
    assert all(step.pred == "v3" for step in plain)
    flow = recipe("dpm_v3", NOISE["flow"], 5)  # from alpha = 0, which no later step reads either
    assert [step.pred for step in flow.steps] == ["x0", "v3", "v3", "v3", "v3"]
    assert [flow.stencil(i).derivatives for i in (1, 2)] == [(), (((1,), None),)]
    for bad, reason in (
        ("order=4", "order must be 1..3, got 4"),
        ("corrector=full", "unknown corrector 'full'; known: pseudo"),
    ):
        with pytest.raises(ValueError, match=reason):
            recipe(f"dpm_v3:{bad}", NOISE["vp"], 5)


# ---- integrals -----------------------------------------------------------------------------------------------------------


def _waves(lam: Tensor) -> list[Tensor]:
    return [0.6 + 0.3 * torch.sin(1.3 * lam), -0.4 + 0.5 * torch.cos(lam), 0.2 * torch.sin(2 * lam + 1)]


LAM = torch.linspace(-2.0, 2.0, 9, dtype=torch.float64)
WAVES = _waves(LAM)
STATISTICS = EmpiricalStatistics(LAM, *WAVES)


def _by_quadrature(start: float, end: float) -> dict[str, float]:
    """The defining integrals, by scipy, of the piecewise linear functions."""
    nodes = [node for node in LAM.tolist() if min(start, end) < node < max(start, end)]

    def integral(f, to: float) -> float:
        inner = [node for node in nodes if min(start, to) < node < max(start, to)]
        ends = [start, *(inner if to > start else inner[::-1]), to]
        return sum(quad(f, a, b, epsabs=1e-13, epsrel=1e-13)[0] for a, b in pairwise(ends))

    l, s, b = (lambda u, wave=wave: float(np.interp(u, LAM.numpy(), wave.numpy())) for wave in WAVES)

    def large_l(u: float) -> float:
        return integral(l, u)

    def large_s(u: float) -> float:
        return integral(s, u)

    def beta(u: float) -> float:
        return integral(lambda v: math.exp(-large_s(v)) * b(v), u)

    moments = [
        integral(lambda u, k=k: math.exp(large_l(u) + large_s(u)) * (u - start) ** k / math.factorial(k), end) for k in range(3)
    ]
    return {
        "decay": math.exp(-large_l(end)),
        "moments": moments,
        "constant": integral(lambda u: math.exp(large_l(u) + large_s(u)) * beta(u), end),
        "beta": beta(end),
        "node decay": math.exp(-large_s(end)),
    }


@pytest.mark.slow
@pytest.mark.parametrize(("start", "end"), [(-1.3, 0.45), (0.1, 0.3), (0.9, -0.2)])
def test_integrals_of_linear_statistics_are_exact(start: float, end: float) -> None:
    reading, expected = LinearReading(STATISTICS), _by_quadrature(start, end)
    a, b = (torch.tensor(value, dtype=torch.float64) for value in (start, end))
    found, node = reading.integrals(a, b, 3), reading.node(b, a)
    assert found.decay.item() == pytest.approx(expected["decay"], rel=1e-12)
    assert [m.item() for m in found.moments] == pytest.approx(expected["moments"], rel=1e-11)
    assert found.constant.item() == pytest.approx(expected["constant"], rel=1e-10, abs=1e-13)
    assert node.beta.item() == pytest.approx(expected["beta"], rel=1e-11, abs=1e-13)
    assert node.decay.item() == pytest.approx(expected["node decay"], rel=1e-12)


def test_the_two_readings_agree_on_a_fine_grid() -> None:
    """Between nodes themselves, the trapezoids converge to the exact integrals at second order."""
    errors = []
    for nodes in (81, 161):
        lam = torch.linspace(-2.0, 2.0, nodes, dtype=torch.float64)
        stats = EmpiricalStatistics(
            lam, 0.6 + 0.3 * torch.sin(1.3 * lam), -0.4 + 0.5 * torch.cos(lam), 0.2 * torch.sin(2 * lam + 1)
        )
        a, b = lam[nodes // 4], lam[3 * nodes // 4]
        found = [reading(stats).integrals(a, b, 2) for reading in (NodeReading, LinearReading)]
        rough, fine = ((*integrals.moments, integrals.constant) for integrals in found)
        errors.append([abs(x - y).item() for x, y in zip(rough, fine, strict=True)])
    assert max(errors[1]) < 1e-3
    for coarse, finer in zip(*errors, strict=True):
        assert coarse / finer == pytest.approx(4.0, abs=0.3)


def test_the_linear_reading_is_differentiable_in_the_times() -> None:
    reading = LinearReading(STATISTICS)

    def values(start: Tensor, end: Tensor) -> Tensor:
        found = reading.integrals(start, end, 3)
        return torch.stack([found.decay, *found.moments, found.constant])

    ends = tuple(torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (-1.3, 0.45))
    assert torch.autograd.gradcheck(values, ends)


@pytest.mark.parametrize("wave", [WAVES, [wave[:, None].expand(-1, 6) for wave in WAVES]], ids=["scalar", "tensor"])
def test_samples_are_differentiable_in_the_times(wave: list[Tensor]) -> None:
    noise, x = NOISE["vp"], torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    steps = (StepStrategy(pred="v3", corr=Corrector(order=2)), StepStrategy(order=2, pred="v3"))
    statistics = EmpiricalStatistics(LAM, *wave)

    def run(middle: Tensor) -> Tensor:
        schedule = SolverSchedule(times=(torch.tensor(0.6, dtype=torch.float64), middle, 0.1), steps=steps)
        return sample(_law().denoiser(noise), x, schedule, noise, statistics=statistics)

    assert torch.autograd.gradcheck(run, torch.tensor(0.3, dtype=torch.float64, requires_grad=True))


# ---- refusals ------------------------------------------------------------------------------------------------------------


def _schedule(*preds: str, times: tuple[float, ...] = (0.6, 0.3, 0.1)) -> SolverSchedule:
    return SolverSchedule(times=times, steps=tuple(StepStrategy(pred=pred) for pred in preds))


def test_statistics_are_needed_by_v3_steps_and_ignored_without_them() -> None:
    noise, x = NOISE["vp"], torch.ones(1, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"steps\[1\]: pred 'v3' needs the model's empirical statistics: .*estimate"):
        Tableau.build(_schedule("x0", "v3"), noise)
    plain = _schedule("x0", "eps")
    assert Tableau.build(plain, noise, statistics=STATISTICS) == Tableau.build(plain, noise)
    assert sample(_law().denoiser(noise), x, _schedule("v3", "v3"), noise, statistics=STATISTICS).shape == x.shape


def test_statistics_must_fit_the_state_and_cover_the_times() -> None:
    noise, vp = NOISE["vp"], _law().denoiser(NOISE["vp"])
    wide = EmpiricalStatistics(LAM, *(wave[:, None].expand(-1, 5) for wave in WAVES))
    with pytest.raises(ValueError, match=r"statistics have shape \(5,\), which does not broadcast to the state's \(6,\)"):
        sample(vp, torch.ones(1, 6), _schedule("v3", "v3"), noise, statistics=wide)
    with pytest.raises(ValueError, match=r"steps\[1\]: lambda = 5.7\d* is outside the statistics, which cover -2 to 2"):
        Tableau.build(_schedule("v3", "v3", times=(0.6, 0.3, 0.0001)), noise, statistics=STATISTICS)
    with pytest.raises(ValueError, match=r"steps\[1\] ends at sigma = 0, .* pred 'v3' is not defined"):
        Tableau.build(_schedule("v3", "v3", times=(0.6, 0.3, 0.0)), noise, statistics=STATISTICS)
    with pytest.raises(ValueError, match="pred 'v3' is defined on axis 'lambda' only"):
        SolverSchedule(times=(0.9, 0.1), steps=(StepStrategy(pred="v3", axis="t"),))


def test_one_number_per_node_costs_nothing_in_a_step() -> None:
    """The tableau then holds floats, as for every other solver, and per-channel statistics broadcast."""
    tableau = Tableau.build(_schedule("v3", "v3"), NOISE["vp"], statistics=STATISTICS)
    assert all(isinstance(c, float) for stage in tableau.stages for row in stage.rows for _, c in row.terms)
    x = torch.ones(2, 3, 4, dtype=torch.float64)
    channels = EmpiricalStatistics(LAM, *(wave[:, None, None].expand(-1, 3, 1) for wave in WAVES))
    law = GaussianMixture(torch.zeros(1, 12), torch.ones(1))
    a, b = (
        sample(law.denoiser(NOISE["vp"]), x, _schedule("v3", "v3"), NOISE["vp"], statistics=s) for s in (STATISTICS, channels)
    )
    assert torch.allclose(a, b, rtol=1e-14)


def test_arithmetic_follows_the_state() -> None:
    channels = EmpiricalStatistics(LAM, *(wave[:, None].expand(-1, 6) for wave in WAVES))
    law, noise, x = _law(), NOISE["vp"], torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    wide = sample(law.denoiser(noise), x.double(), _schedule("v3", "v3"), noise, statistics=channels)
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        narrow = sample(law.denoiser(noise), x.to(dtype), _schedule("v3", "v3"), noise, statistics=channels)
        assert narrow.dtype == dtype
        assert (narrow.double() - wide).norm() / wide.norm() < limit

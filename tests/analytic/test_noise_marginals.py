"""What the noise is for: chains that keep the data's marginals, how fast they do, and samples that agree with both."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from samplers import NoiseSchedule, SolverSchedule, parse_recipe, recipe, sample

VP = NoiseSchedule.vp_linear()
EXACT = 1e-13


def _with(text: str, **options: object) -> str:
    return text + "".join(f"{',' if ':' in text or i else ':'}{key}={value}" for i, (key, value) in enumerate(options.items()))


def _even(text: str, n: int) -> SolverSchedule:
    """The recipe at its own order on n equal steps in lambda."""
    if "lower_order_final" in parse_recipe(text).options:
        text = _with(text, lower_order_final="false")
    at = VP.t_of_lam(torch.linspace(-1.5, 1.5, n + 1, dtype=torch.float64))
    return parse_recipe(text).schedule(VP, n, at=tuple(at.tolist()))


def _errors(text: str, n: int, chain: Any, tau: float) -> tuple[float, float]:
    """Errors of a run that starts from the marginal: of how far a shift of x_T moves the mean, and of the variance.

    The mean itself stays exact in every chain. A shift obeys the linear equation of the SDE with this tau,
    d log(x / sigma) = (-tau^2 + (1 + tau^2) w) d lambda with w = s^2 e^(2 lambda) / (s^2 e^(2 lambda) + 1).
    """
    schedule = _even(text, n)
    ends = schedule.times[0], schedule.times[-1]
    (_, sigma, lam), (_, sigma_next, lam_next) = (chain.levels(VP, t) for t in ends)
    growth = math.log1p(chain.std**2 * math.exp(2 * lam_next)) - math.log1p(chain.std**2 * math.exp(2 * lam))
    shift = sigma_next / sigma * math.exp(-(tau**2) * (lam_next - lam) + (1 + tau**2) / 2 * growth)
    c = chain.probed(schedule, VP)
    mean, variance = chain.moments(c, *chain.marginal(VP, ends[0]))
    assert mean == pytest.approx(chain.marginal(VP, ends[1])[0], rel=1e-12)
    return abs(c[1] - shift), abs(variance - chain.marginal(VP, ends[1])[1])


@pytest.mark.parametrize("tau", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("text", ["dpmpp:order=1", "dpmpp:order=2", "dpmpp:order=3,taylor=true", "sa_solver:low=0,high=1"])
def test_the_sde_keeps_the_marginals(text: str, tau: float, chain: Any) -> None:
    coarse, fine = (_errors(_with(text, tau=tau), n, chain, tau) for n in (40, 320))
    assert max(fine) < 0.01
    assert fine[0] < max(coarse[0] / 6, EXACT)
    assert fine[1] < coarse[1] / 6


@pytest.mark.parametrize(
    ("text", "tau", "order"),
    [
        ("ddpm", 1.0, 1),
        ("euler_ancestral", 1.0, 1),
        ("dpmpp:order=1", 1.0, 1),
        ("dpmpp:order=1", 0.5, 1),
        ("dpm:order=1,method=multistep", 1.0, 1),
        ("dpm:order=2,method=multistep", 1.0, 2),
        ("dpmpp:order=2", 1.0, 2),
        ("dpmpp:order=2,solver_type=heun", 1.0, 2),
        ("dpmpp:order=2,solver_type=heun", 0.5, 2),
        ("dpmpp:order=2", 0.0, 2),
        ("sa_solver:order=2,corrector=0,low=0,high=1", 1.0, 2),
        ("sa_solver:order=2,low=0,high=1", 1.0, 2),
    ],
)
def test_weak_order(text: str, tau: float, order: int, chain: Any) -> None:
    """Ancestral steps in the x0 form move the mean exactly: their x0 is the mean of all that x_t may have come from."""
    full = text if text in ("ddpm", "euler_ancestral") else _with(text, tau=tau)
    (mean, variance), fine = _errors(full, 160, chain, tau), _errors(full, 320, chain, tau)
    assert math.log2(variance / fine[1]) == pytest.approx(order, abs=0.15)
    if tau == 1.0 and not text.startswith("dpm:"):
        assert max(mean, fine[0]) < EXACT
    else:
        assert math.log2(mean / fine[0]) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_lcm_is_exact_for_an_exact_consistency_function(n: int, chain: Any) -> None:
    """x0 by the whole ODE has the data's law, and fresh noise makes every marginal from it."""

    def consistent(x: Tensor, t: Tensor) -> Tensor:
        mean, variance = chain.marginal(VP, t.item())
        return chain.mean + chain.std / math.sqrt(variance) * (x - mean)

    for final, t in (("zero", 0.0), ("sigma_min", VP.t_min)):
        schedule = recipe(f"lcm:final={final}", VP, n)
        c = chain.probed(schedule, VP, consistent)
        got = chain.moments(c, *chain.marginal(VP, schedule.times[0]))
        assert got == pytest.approx(chain.marginal(VP, t), rel=1e-12)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("repeats", "inner"), [(1, 10), (2, 20), (4, 10)])
def test_restart(repeats: int, inner: int, order: int, chain: Any) -> None:
    """The evaluations asked for; the marginal of the data as steps grow, however often an interval is repeated."""
    text = f"restart:order={order},repeats={repeats},inner={inner},grid=lambda,final=sigma_min"
    schedule = recipe(text, VP, 160)
    jumps = [i for i, step in enumerate(schedule.steps) if step.eval.source == "none"]
    assert schedule.nfe == 160
    assert len(jumps) == repeats
    assert len(schedule.steps) == 160 + repeats
    for i in jumps:
        assert schedule.times[i + 1] > schedule.times[i]
        assert schedule.times[i + 1 + inner] == pytest.approx(schedule.times[i], rel=1e-12)
        assert VP.lam(schedule.times[i + 1]).neg().exp().item() == pytest.approx(0.3)
    mean, variance = chain.moments(chain.probed(schedule, VP), *chain.marginal(VP, schedule.times[0]))
    wanted = chain.marginal(VP, schedule.times[-1])
    assert mean == pytest.approx(wanted[0], rel=1e-10)
    assert variance == pytest.approx(wanted[1], rel=0.08 if order == 1 else 0.01)


@pytest.mark.parametrize("order", [1, 2])
def test_a_restart_forgets_what_came_before_in_part(order: int, chain: Any) -> None:
    """Every repeat contracts what x_T left: that is what it is for."""
    left = []
    for repeats in (1, 2, 3):
        text = f"restart:order={order},repeats={repeats},inner=10,low=0.2,high=2,final=sigma_min"
        left.append(abs(chain.probed(recipe(text, VP, 60 + 10 * repeats), VP)[1]))
    assert left[0] > 1.5 * left[1] > 2.2 * left[2]


SAMPLED = ["ddpm", "lcm", "dpmpp:order=2,tau=1", "dpm:order=2,method=multistep,tau=1", "sa_solver", "restart", "tcd:eta=0.5"]


@pytest.mark.parametrize("text", SAMPLED)
def test_samples_have_the_moments_of_the_chain(text: str, chain: Any) -> None:
    schedule, count = recipe(_with(text, final="sigma_min"), VP, 6), 20000
    mean, variance = chain.moments(chain.probed(schedule, VP), 0.0, 1.0)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(count, 1, dtype=torch.float64, generator=generator)
    out = sample(chain.law.denoiser(VP), x, schedule, VP, generator=generator)
    assert out.mean().item() == pytest.approx(mean, abs=4 * math.sqrt(variance / count))
    assert out.var().item() == pytest.approx(variance, rel=4 * math.sqrt(2 / count))

"""The Feynman-Kac equation on a grid: proposal and weight, read off the code's small steps, must carry p_t along."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from samplers import NoiseSchedule
from samplers.denoisers import GaussianMixture
from samplers.particles import FeynmanKac, Target
from samplers.particles.hooks import run as hooks_run
from samplers.particles.hooks.plans import Plan
from samplers.particles.path import Level, Move, log_density_change, log_interval, move, rate

NS = NoiseSchedule.vp_linear()
UNIT = torch.linspace(-10, 10, 4001, dtype=torch.float64)  # of the noised laws' own width
DT = 1e-6
MODELS = {
    "uncond": GaussianMixture(
        torch.tensor([[-2.0], [0.0], [2.0]]), torch.tensor([0.4, 0.5, 0.4]).sqrt(), torch.tensor([8.0, 7, 5])
    ),
    "cond": GaussianMixture(torch.tensor([[1.6], [-1.8]]), torch.tensor([0.2, 0.25]).sqrt(), torch.tensor([0.8, 0.2])),
    "other": GaussianMixture(torch.tensor([[0.5]]), torch.tensor([0.9])),
}
TARGETS = {
    "guidance 3": Target.cfg(3.0),
    "guidance 1.5": Target.cfg(1.5),
    "geometric mean": Target.cfg(0.5),
    "product": Target.product("uncond", "cond"),
    "product squared": Target.product("uncond", "cond", beta=2.0),
    "annealed 0.5": Target({"uncond": 0.5}),
    "annealed 3": Target({"uncond": 3.0}),
    "annealed guidance": Target.guided_power(2.0, 2.0),
    "composed": Target.compose(uncond=-2.0, cond=1.5, other=1.5),
}
TIMES = (0.1, 0.3, 0.6)
Steps = tuple[Move, Tensor]


def level(t: float) -> Level:
    alpha, sigma = NS.alpha_sigma(t)
    return Level(torch.tensor(t, dtype=torch.float64), 1.0, float(sigma / alpha))  # x / alpha: variance exploding


def grid(at: Level) -> Tensor:
    return UNIT * (1.0 + at.sigma**2) ** 0.5


def density(target: Target, at: Level, x: Tensor) -> Tensor:
    g = target.at(float(at.t))
    log_p = sum(w * MODELS[name].log_prob(x[:, None], 1.0, at.sigma) for w, name in zip(g, target.branches, strict=True))
    return (log_p - log_p.logsumexp(0)).exp() / (x[1] - x[0])


def eps(name: str, at: Level, x: Tensor | None = None) -> Tensor:
    return -at.sigma * MODELS[name].score((grid(at) if x is None else x)[:, None], 1.0, at.sigma)


def residual(target: Target, t: float, multiplier: float, change: Callable[[Tensor, Move], tuple[Tensor, Move]]) -> float:
    """L1 norm of d_t p - (generator + weight) p in the noise schedule's time; ``change`` plants errors."""
    now, after, before = level(t), level(t - DT), level(t + DT)
    g, x = target.at(t), grid(now)
    dx = x[1] - x[0]
    noises = [eps(name, now) for name in target.branches]
    weight = 0.5 * rate(g, noises) * log_interval(now, after) / DT
    weight, step = change(weight, move(now, after, sum(g), multiplier))
    mean = x - now.sigma * sum(w * e[:, 0] for w, e in zip(g, noises, strict=True)) / sum(g)
    p = density(target, now, x)
    flow = ((step.keep - 1.0) * x + step.pull * mean) / DT * p
    divergence = (flow.roll(-1) - flow.roll(1)) / (2 * dx)
    laplacian = (p.roll(-1) - 2 * p + p.roll(1)) / dx**2
    right = -divergence + 0.5 * step.noise**2 / DT * laplacian + p * (weight - (p * weight).sum() * dx)
    left = (density(target, after, x) - density(target, before, x)) / (2 * DT)
    return float((left - right).abs()[2:-2].sum() * dx)


def unchanged(weight: Tensor, step: Move) -> Steps:
    return weight, step


ERRORS: dict[str, Callable[[Tensor, Move], tuple[Tensor, Move]]] = {
    "no weight": lambda w, m: (0.0 * w, m),
    "wrong sign": lambda w, m: (-w, m),
    "twice": lambda w, m: (2.0 * w, m),
    "half": lambda w, m: (0.5 * w, m),
}


@pytest.mark.parametrize("multiplier", [0.0, 0.5, 1.0, 1.7])
@pytest.mark.parametrize("name", TARGETS)
def test_solves_the_feynman_kac_equation(name: str, multiplier: float) -> None:
    for t in TIMES:
        assert residual(TARGETS[name], t, multiplier, unchanged) < 1e-2


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("name", TARGETS)
def test_wrong_weights_are_seen(name: str, error: str) -> None:
    assert max(residual(TARGETS[name], t, 1.0, ERRORS[error]) for t in TIMES) > 0.2


@pytest.mark.parametrize("name", ["guidance 3", "annealed 3"])
def test_noise_without_its_drift_is_seen(name: str) -> None:
    """The common mistake of scaling the noise alone."""
    louder = lambda w, m: (w, Move(m.keep, m.pull, 1.3 * m.noise))  # noqa: E731
    assert max(residual(TARGETS[name], t, 1.0, louder) for t in TIMES) > 0.2


def test_one_branch_to_the_first_power_weighs_nothing() -> None:
    noises = [eps("uncond", level(0.3)), eps("cond", level(0.3))]
    for target in (Target.cfg(0.0), Target.cfg(1.0), Target.power(1.0)):
        assert rate(target.at(0.3), noises[: len(target.branches)]).abs().max() == 0.0


def test_a_model_times_itself_is_its_square() -> None:
    noise = eps("cond", level(0.3))
    torch.testing.assert_close(rate((1.0, 1.0), [noise, noise]), rate((2.0,), [noise]))


def test_weights_of_exponents_that_sum_to_one_ignore_what_branches_share() -> None:
    noises = [eps(name, level(0.3)) for name in ("uncond", "cond", "other")]
    shared = 50.0 * torch.randn(len(UNIT), 1, dtype=torch.float64)
    g = (-2.0, 1.5, 1.5)
    torch.testing.assert_close(rate(g, [e + shared for e in noises]), rate(g, noises), atol=1e-9, rtol=1e-9)


def test_order_of_branches_does_not_matter() -> None:
    noises = [eps(name, level(0.3)) for name in ("uncond", "cond", "other")]
    torch.testing.assert_close(rate((-2.0, 1.5, 3.5), noises), rate((3.5, -2.0, 1.5), [noises[2], *noises[:2]]))


def test_two_branches_follow_the_guidance_formula() -> None:
    u, c = eps("uncond", level(0.3)), eps("cond", level(0.3))
    torch.testing.assert_close(rate((-2.0, 3.0), [u, c]), 3.0 * 2.0 * (u - c)[:, 0] ** 2)


@pytest.mark.parametrize("multiplier", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("total", [1.0, 2.5])
def test_long_steps_are_exact_for_a_constant_prediction(multiplier: float, total: float) -> None:
    """Many short steps and one long one give the same mean and variance."""
    grid = torch.logspace(1, -1, 4001, dtype=torch.float64).tolist()
    levels = [Level(torch.tensor(s), 1.0, s) for s in grid]
    keep, pull, variance = 1.0, 0.0, 0.0
    for now, after in pairwise(levels):
        step = move(now, after, total, multiplier)
        keep, pull, variance = keep * step.keep, pull * step.keep + step.pull, variance * step.keep**2 + step.noise**2
    whole = move(levels[0], levels[-1], total, multiplier)
    assert (keep, pull, variance**0.5) == pytest.approx((whole.keep, whole.pull, whole.noise), rel=1e-9)


def test_log_densities_are_followed_along_a_path(generator: Callable[..., torch.Generator]) -> None:
    model, g = MODELS["cond"], generator()
    errors = []
    for steps in (60, 240):
        ratios = torch.logspace(2, -1, steps + 1, dtype=torch.float64).tolist()
        levels = [Level(torch.tensor(s), 1.0, s) for s in ratios]
        x = levels[0].sigma * torch.randn(1000, 1, generator=g, dtype=torch.float64)
        followed = start = model.log_prob(x, 1.0, levels[0].sigma)
        for now, after in pairwise(levels):
            e = -now.sigma * model.score(x, 1.0, now.sigma)
            step = move(now, after, 1.0, 1.0)
            moved = step.keep * x + step.pull * (x - now.sigma * e)
            moved = moved + step.noise * torch.randn(x.shape, generator=g, dtype=x.dtype)
            followed = followed + log_density_change(e, moved - x, now, after)
            x = moved
        exact = model.log_prob(x, 1.0, levels[-1].sigma)
        errors.append(float((followed - exact).abs().mean()))
        assert float((start - exact).abs().mean()) > 3.0  # there was something to follow
    assert errors[1] < 0.3
    assert errors[1] < 0.65 * errors[0]  # half an order in the step at least


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow_prediction", "edm"])
@pytest.mark.parametrize("g", [(-1.0, 2.0), (-2.0, 1.5, 1.5)])
def test_pipelines_weigh_any_prediction_alike(
    kind: str, g: tuple[float, ...], generator: Callable[..., torch.Generator]
) -> None:
    """In a pipeline, from the network's outputs as from noise predictions; exponents sum to 1 there."""
    alpha, sigma = {"flow_prediction": (0.3, 0.7), "edm": (1.0, 2.5)}.get(kind, (0.6, 0.8))
    now, after = Level(torch.tensor(0.5), alpha, sigma), Level(torch.tensor(0.4), 0.9, 0.2)
    x = torch.randn(5, 2, 3, generator=generator(), dtype=torch.float64)
    x0 = [torch.randn(x.shape, generator=generator(i), dtype=torch.float64) for i in range(len(g))]
    noises = [(x - alpha * d) / sigma for d in x0]
    data = 0.5
    skip, out = data**2 / (sigma**2 + data**2), sigma * data / (sigma**2 + data**2) ** 0.5
    outputs = {
        "epsilon": noises,
        "v_prediction": [alpha * e - sigma * d for e, d in zip(noises, x0, strict=True)],
        "sample": x0,
        "flow_prediction": [e - d for e, d in zip(noises, x0, strict=True)],
        "edm": [(d - skip * x) / out for d in x0],
    }[kind]
    plan = Plan([now, after], [True], "epsilon" if kind == "edm" else kind, data if kind == "edm" else None, False, None, True)
    call = hooks_run.Call(5, 2.0, None, "all", lambda v: v)
    steps = hooks_run.Steps(FeynmanKac(Target.cfg(2.0)), call, None, None, plan)
    torch.testing.assert_close(steps._weight(g, outputs), 0.5 * rate(g, noises) * log_interval(now, after))

"""Known solvers written out from their papers, step by step, against what the tableau compiles."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from samplers import NoiseSchedule, SolverSchedule, StepStrategy, recipe, sample

NOISE = {
    "vp": NoiseSchedule.vp_linear(),
    "cosine": NoiseSchedule.vp_cosine(),
    "edm": NoiseSchedule.edm(),
    "flow": NoiseSchedule.flow(),
}
ALL = pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)
LAMBDAS = torch.tensor([-2.0, -1.1, -0.6, 0.2, 0.9, 2.1, 2.6], dtype=torch.float64)  # uneven on purpose
X = torch.tensor([[0.4, -1.0], [1.7, 0.2], [-0.6, 0.9]], dtype=torch.float64)
FULL = "lower_order_final=false,final=sigma_min"


class Level(NamedTuple):
    """A time and what the noise schedule says there."""

    t: Tensor
    alpha: float
    sigma: float
    lam: float


Update = Callable[[list[Level], int, list[Tensor], list[Tensor]], Tensor]


def _denoise(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x) * (1 - 0.2 * t / (1 + t)) + 0.3


def _check(noise: NoiseSchedule, steps: Sequence[StepStrategy], update: Update) -> None:
    """Run ``steps``, and a plain loop with ``update(levels, i, states so far, x0-predictions so far)`` as step i."""
    t = noise.t_of_lam(LAMBDAS)
    levels = [Level(u, *(value(u).item() for value in (noise.alpha, noise.sigma, noise.lam))) for u in t]
    states, history = [X], []
    for i in range(6):
        history.append(_denoise(states[-1], t[i]))
        states.append(update(levels, i, states, history))
    result = sample(_denoise, X, SolverSchedule(times=tuple(t.tolist()), steps=tuple(steps)), noise)
    torch.testing.assert_close(result, states[-1], rtol=1e-10, atol=1e-11)


def ddim(levels: list[Level], i: int, x: list[Tensor], history: list[Tensor]) -> Tensor:
    """Equation 12 of arXiv:2010.02502 with eta = 0."""
    s, t = levels[i], levels[i + 1]
    return t.alpha * history[-1] + t.sigma * (x[-1] - s.alpha * history[-1]) / s.sigma


def dpmpp_2m(levels: list[Level], i: int, x: list[Tensor], history: list[Tensor]) -> Tensor:
    """Algorithm 2 of arXiv:2211.01095."""
    s, t = levels[i], levels[i + 1]
    h, d = t.lam - s.lam, history[-1]
    if i:
        r = (s.lam - levels[i - 1].lam) / h
        d = (1 + 1 / (2 * r)) * history[-1] - 1 / (2 * r) * history[-2]
    return t.sigma / s.sigma * x[-1] - t.alpha * math.expm1(-h) * d


def dpmpp_3m(levels: list[Level], i: int, x: list[Tensor], history: list[Tensor]) -> Tensor:
    """The multistep third order of every released code: half of what the Taylor step makes of D_2."""
    if i < 2:
        return dpmpp_2m(levels, i, x, history)
    s, t = levels[i], levels[i + 1]
    h, h0, h1 = t.lam - s.lam, s.lam - levels[i - 1].lam, levels[i - 1].lam - levels[i - 2].lam
    recent, older = h / h0 * (history[-1] - history[-2]), h / h1 * (history[-2] - history[-3])
    d1 = recent + h0 / (h0 + h1) * (recent - older)
    d2 = h / (h0 + h1) * (recent - older)
    e = math.expm1(-h)
    change = -e * history[-1] + (e / h + 1) * d1 - ((e + h) / h**2 - 0.5) * d2
    return t.sigma / s.sigma * x[-1] + t.alpha * change


def dpmpp_2s(levels: list[Level], i: int, x: list[Tensor], history: list[Tensor]) -> Tensor:
    """Algorithm 1 of arXiv:2211.01095 with nodes given: an odd step restarts where the even one before it started."""
    if i % 2 == 0:
        return ddim(levels, i, x, history)
    s, u, t = levels[i - 1 : i + 2]
    h = t.lam - s.lam
    r = (u.lam - s.lam) / h
    d = (1 - 1 / (2 * r)) * history[-2] + 1 / (2 * r) * history[-1]
    return t.sigma / s.sigma * x[-2] - t.alpha * math.expm1(-h) * d


@ALL
@pytest.mark.parametrize(
    "text", ["ddim", "euler", "dpmpp:order=1", "unipc:order=1,corrector=false", "deis:order=1", "ipndm:order=1"]
)
def test_first_order_is_ddim(noise: NoiseSchedule, text: str) -> None:
    _check(noise, recipe(text, noise, 6).steps, ddim)


@ALL
@pytest.mark.parametrize(
    ("text", "update"),
    [
        (f"dpmpp:order=2,{FULL}", dpmpp_2m),
        (f"dpmpp:order=3,{FULL}", dpmpp_3m),
        (f"dpmpp:order=2,method=singlestep,{FULL}", dpmpp_2s),
    ],
)
def test_dpmpp_is_its_paper(noise: NoiseSchedule, text: str, update: Update) -> None:
    _check(noise, recipe(text, noise, 6).steps, update)


def test_a_wrong_formula_is_noticed() -> None:
    with pytest.raises(AssertionError):
        _check(NOISE["vp"], recipe(f"dpmpp:order=3,taylor=true,{FULL}", NOISE["vp"], 6).steps, dpmpp_3m)


# ---- Adams-Bashforth -----------------------------------------------------------------------------------------------

ADAMS = {1: (1.0,), 2: (1.5, -0.5), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


@ALL
@pytest.mark.parametrize(("order", "pred"), list(itertools.product((1, 2, 3, 4), ("eps", "x0"))))
def test_index_axis_is_adams_bashforth_of_plain_increments(noise: NoiseSchedule, order: int, pred: str) -> None:
    """x / alpha moves by eps times the change of sigma / alpha (iPNDM); x / sigma by x0 times that of alpha / sigma."""
    past: list[Tensor] = []

    def update(levels: list[Level], i: int, x: list[Tensor], history: list[Tensor]) -> Tensor:
        s, t = levels[i], levels[i + 1]
        past.append((x[-1] - s.alpha * history[-1]) / s.sigma if pred == "eps" else history[-1])
        slope = sum(w * f for w, f in zip(ADAMS[min(order, i + 1)], reversed(past), strict=False))
        if pred == "eps":
            return t.alpha * (x[-1] / s.alpha + (t.sigma / t.alpha - s.sigma / s.alpha) * slope)
        return t.sigma * (x[-1] / s.sigma + (t.alpha / t.sigma - s.alpha / s.sigma) * slope)

    _check(noise, [StepStrategy(order=min(order, i + 1), pred=pred, axis="index") for i in range(6)], update)
    if pred == "eps":
        past.clear()
        _check(noise, recipe(f"ipndm:order={order}", noise, 6).steps, update)


@ALL
@pytest.mark.parametrize("order", [2, 3, 4])
def test_deis_on_sigma_is_variable_step_adams_bashforth(noise: NoiseSchedule, order: int) -> None:
    """Integrals of the Lagrange polynomials of eps in sigma / alpha (rhoAB of arXiv:2204.13902)."""
    past: list[tuple[float, Tensor]] = []

    def update(levels: list[Level], i: int, x: list[Tensor], history: list[Tensor]) -> Tensor:
        s, t = levels[i], levels[i + 1]
        past.append((s.sigma / s.alpha, (x[-1] - s.alpha * history[-1]) / s.sigma))
        nodes = past[-min(order, i + 1) :]
        change = torch.zeros_like(x[-1])
        for at, eps in nodes:
            others = [other for other, _ in nodes if other != at]
            change += eps * _boole(lambda u: math.prod((u - o) / (at - o) for o in others), s, t)  # noqa: B023
        return t.alpha * (x[-1] / s.alpha + change)

    _check(noise, recipe(f"deis:order={order},axis=sigma,{FULL}", noise, 6).steps, update)


def _boole(f: Callable[[float], float], s: Level, t: Level) -> float:
    """Integral over the step in sigma / alpha by Boole's rule, exact for the cubics met here."""
    low, high = s.sigma / s.alpha, t.sigma / t.alpha
    points = [low + (high - low) * k / 4 for k in range(5)]
    return (high - low) / 90 * sum(w * f(u) for w, u in zip((7, 32, 12, 32, 7), points, strict=True))


# ---- relaxations ---------------------------------------------------------------------------------------------------

FACTORS: dict[tuple[str, float | str | None], Callable[[float], float]] = {
    ("x0", None): lambda h: 1.0,
    ("x0", 0.3): lambda h: 1 + 0.3 * h,
    ("x0", "half"): lambda h: 0.5,
    ("x0", "bh1"): lambda h: 0.5 * h**2 / (math.exp(-h) - 1 + h),
    ("x0", "bh2"): lambda h: 0.5 * h * (1 - math.exp(-h)) / (math.exp(-h) - 1 + h),
    ("x0", "exp+"): lambda h: 1 + 0.5 * (math.exp(h) - 1),
    ("x0", "exp-"): lambda h: 1 - 0.5 * (math.exp(h) - 1),
    ("eps", -0.2): lambda h: 1 - 0.2 * h,
    ("eps", "bh1"): lambda h: 0.5 * h**2 / (math.exp(h) - 1 - h),
    ("eps", "bh2"): lambda h: 0.5 * h * (math.exp(h) - 1) / (math.exp(h) - 1 - h),
}


@ALL
@pytest.mark.parametrize(("pred", "relax"), list(FACTORS))
def test_relaxations_are_what_they_say(noise: NoiseSchedule, pred: str, relax: float | str | None) -> None:
    """Order-2 steps with a factor on D_1, against the formulas of arXiv:2302.04867 and arXiv:2312.07243."""
    past: list[Tensor] = []

    def update(levels: list[Level], i: int, x: list[Tensor], history: list[Tensor]) -> Tensor:
        s, t = levels[i], levels[i + 1]
        past.append(history[-1] if pred == "x0" else (x[-1] - s.alpha * history[-1]) / s.sigma)
        first = ddim(levels, i, x, history)
        if i == 0:
            return first
        h = t.lam - s.lam
        weight = t.alpha * (h - 1 + math.exp(-h)) if pred == "x0" else -t.sigma * (math.exp(h) - 1 - h)
        return first + weight * FACTORS[pred, relax](h) * (past[-1] - past[-2]) / (s.lam - levels[i - 1].lam)

    steps = [StepStrategy(pred=pred)] + [StepStrategy(order=2, pred=pred, relax=(relax,))] * 5
    _check(noise, steps, update)


def test_flow_ddim_is_euler_of_the_velocity() -> None:
    schedule = recipe("euler", NOISE["flow"], 6)
    x = X
    for t, to in itertools.pairwise(schedule.times):
        x = x + (to - t) * (x - _denoise(x, torch.tensor(t, dtype=torch.float64))) / t
    torch.testing.assert_close(sample(_denoise, X, schedule, NOISE["flow"]), x, rtol=1e-12, atol=1e-12)

"""Steps that draw noise: the coefficients of whole runs against the published formulas, computed by hand."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from numpy.polynomial import Polynomial
from scipy.integrate import quad

from samplers import Evaluation, Noise, NoiseSchedule, SolverSchedule, StepStrategy, Tableau, parse_recipe, recipe

VP = NoiseSchedule.vp_linear()
NOISES = {"vp": VP, "cosine": NoiseSchedule.vp_cosine(), "edm": NoiseSchedule.edm(), "flow": NoiseSchedule.flow()}
families = pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
Vector = np.ndarray
Levels = tuple[float, float, float]  # alpha, sigma, lambda
Known = list[tuple[float, Vector]]  # lambda and x0-prediction of the nodes, latest first


def _times(*lam: float) -> tuple[float, ...]:
    return tuple(VP.t_of_lam(torch.tensor(lam, dtype=torch.float64)).tolist())


def _eta(a: Levels, b: Levels, x: Vector, known: Known, xi: Vector, eta: float) -> Vector:
    """DDIM, arXiv:2010.02502, eq. 12 and 16, in the levels of VP."""
    (alpha, sigma, _), (alpha_next, sigma_next, _), x0 = a, b, known[0][1]
    spread = eta * math.sqrt(sigma_next**2 / sigma**2 * (1 - alpha**2 / alpha_next**2))
    return alpha_next * x0 + math.sqrt(sigma_next**2 - spread**2) * (x - alpha * x0) / sigma + spread * xi


def _tau(a: Levels, b: Levels, x: Vector, known: Known, xi: Vector, tau: float, order: int) -> Vector:
    """arXiv:2309.05019, eq. 14: the integral of the polynomial through the known x0-predictions, by quadrature."""
    (_, sigma, lam), (alpha_next, sigma_next, lam_next) = a, b
    h, rate, known = lam_next - lam, 1 + tau**2, known[:order]
    out = sigma_next / sigma * math.exp(-(tau**2) * h) * x + sigma_next * math.sqrt(-math.expm1(-2 * tau**2 * h)) * xi
    for at, value in known:
        basis = Polynomial([1.0])
        for other, _ in known:
            if other != at:
                basis *= Polynomial([-other, 1.0]) / (at - other)
        weight = quad(lambda u, p=basis: math.exp(rate * (u - lam_next)) * p(u), lam, lam_next, epsabs=0, epsrel=1e-13)[0]
        out = out + rate * alpha_next * weight * value
    return out


def _sde_2m(a: Levels, b: Levels, x: Vector, known: Known, xi: Vector, heun: bool) -> Vector:
    """SDE-DPM-Solver++(2M), arXiv:2211.01095, appendix."""
    if len(known) == 1:
        return _tau(a, b, x, known, xi, 1.0, 1)
    (_, sigma, lam), (alpha_next, sigma_next, lam_next) = a, b
    (_, now), (before, last) = known[:2]
    h = lam_next - lam
    slope, kept = (now - last) * (h / (lam - before)), -math.expm1(-2 * h)
    second = 1 - kept / (2 * h) if heun else kept / 2
    x0 = alpha_next * (kept * now + second * slope)
    return sigma_next / sigma * math.exp(-h) * x + x0 + sigma_next * math.sqrt(kept) * xi


def _sde_eps(a: Levels, b: Levels, x: Vector, known: Known, xi: Vector, order: int) -> Vector:
    """SDE-DPM-Solver-1 and its multistep order 2 (midpoint), arXiv:2211.01095, eq. 18; known holds eps here."""
    (alpha, _, lam), (alpha_next, sigma_next, lam_next) = a, b
    h, eps = lam_next - lam, known[0][1]
    if order == 2 and len(known) > 1:
        eps = eps + (eps - known[1][1]) * (h / (lam - known[1][0])) / 2
    return alpha_next / alpha * x - 2 * sigma_next * math.expm1(h) * eps + sigma_next * math.sqrt(math.expm1(2 * h)) * xi


def _fresh(a: Levels, b: Levels, x: Vector, known: Known, xi: Vector) -> Vector:
    return b[0] * known[0][1] + b[1] * xi


HAND: dict[str, Callable[..., Vector]] = {
    "ddpm": partial(_eta, eta=1.0),
    "ddim:eta=0.6": partial(_eta, eta=0.6),
    "euler_ancestral": partial(_eta, eta=1.0),
    "euler_ancestral:eta=0.3": partial(_eta, eta=0.3),
    "lcm": _fresh,
    "dpm:order=1,method=multistep,tau=1": partial(_sde_eps, order=1),
    "dpm:order=2,method=multistep,tau=1": partial(_sde_eps, order=2),
    "dpmpp:order=1,tau=1": partial(_tau, tau=1.0, order=1),
    "dpmpp:order=1,tau=0.5": partial(_tau, tau=0.5, order=1),
    "dpmpp:order=2,tau=1": partial(_sde_2m, heun=False),
    "dpmpp:order=2,solver_type=heun,tau=1": partial(_sde_2m, heun=True),
    "dpmpp:order=2,solver_type=heun,tau=0.7": partial(_tau, tau=0.7, order=2),
    "dpmpp:order=3,solver_type=heun,taylor=true,tau=1": partial(_tau, tau=1.0, order=3),
    "sa_solver:order=1,corrector=0,low=0,high=1": partial(_tau, tau=1.0, order=1),
}


@pytest.mark.parametrize("text", HAND)
def test_the_chain_is_the_published_one(text: str, chain: Any) -> None:
    parsed, times = parse_recipe(text), _times(-2.0, -1.6, -0.7, 0.1, 0.6, 1.9)
    if "lower_order_final" in parsed.options:
        parsed = parse_recipe(f"{text},lower_order_final=false")
    unit = np.eye(7)
    x, known = unit[1], []
    for i in range(5):
        a, b = chain.levels(VP, times[i]), chain.levels(VP, times[i + 1])
        prediction = chain.denoise(VP, times[i], x)
        if text.startswith("dpm:"):
            prediction = (x - a[0] * prediction) / a[1]
        known.insert(0, (a[2], prediction))
        x = HAND[text](a, b, x, known, unit[i + 2])
    np.testing.assert_allclose(chain.probed(parsed.schedule(VP, 5, at=times), VP), x, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("order", [2, 3])
def test_the_corrector_keeps_the_noise_of_its_step(order: int, chain: Any) -> None:
    """SA-Solver, arXiv:2309.05019, algorithm 1: predictor and corrector share xi; order-2 terms are h^2 / 2, as published."""
    tau, times = 0.8, _times(-1.0, -0.4, 0.1, 0.9)
    text = f"sa_solver:order={order},corrector={order},tau={tau},low=0,high=1,lower_order_final=false"
    unit, levels = np.eye(5), [chain.levels(VP, t) for t in times]

    def advance(i: int, x: Vector, nodes: Known, start: Vector) -> Vector:
        if len(nodes) != 2:
            return _tau(levels[i], levels[i + 1], x, nodes, unit[i + 2], tau, 3)
        h = levels[i + 1][2] - levels[i][2]
        slope = (nodes[0][1] - nodes[1][1]) / (nodes[0][0] - nodes[1][0])
        flat = _tau(levels[i], levels[i + 1], x, [(levels[i][2], start)], unit[i + 2], tau, 1)
        return flat + (1 + tau**2) * levels[i + 1][0] * h**2 / 2 * slope

    known: Known = []
    predicted = corrected = unit[1]
    for i in range(3):
        known.insert(0, (levels[i][2], chain.denoise(VP, times[i], predicted)))
        if i:  # the network has answered at the predicted state: redo the step before
            corrected = advance(i - 1, corrected, known[:order], known[1][1])
        predicted = advance(i, corrected, known[:order], known[0][1])
    schedule = parse_recipe(text).schedule(VP, 3, at=times)
    np.testing.assert_allclose(chain.probed(schedule, VP), predicted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.8])
def test_tcd_goes_beyond_and_back(eta: float, chain: Any) -> None:
    """arXiv:2402.19159, algorithm 4: DDIM to (1 - eta) t, then the forward process to t."""
    schedule = recipe(f"tcd:eta={eta}", VP, 6)
    back = [i for i, step in enumerate(schedule.steps) if step.eval.source == "none"]
    assert schedule.nfe == 6
    assert len(back) == (0 if eta == 0 else 5)
    assert [schedule.times[i] / schedule.times[i + 1] for i in back] == pytest.approx([1 - eta] * len(back))
    unit = np.eye(len(back) + 2)
    x = unit[1]
    for i, (t, s) in enumerate(zip(schedule.times[:-1], schedule.times[1:], strict=True)):
        a, b = chain.levels(VP, t), chain.levels(VP, s)
        if i in back:
            x = b[0] / a[0] * x + math.sqrt(b[1] ** 2 - (b[0] / a[0] * a[1]) ** 2) * unit[2 + back.index(i)]
        else:
            x = _eta(a, b, x, [(a[2], chain.denoise(VP, t, x))], x, 0.0)
    np.testing.assert_allclose(chain.probed(schedule, VP), x, rtol=1e-9, atol=1e-12)


def _one(noise: NoiseSchedule, step: StepStrategy, s: float | None = None) -> tuple[dict[str, float], float]:
    """Coefficients and noise of one step from lambda -0.6 to 0.5."""
    t, usual = (noise.t_of_lam(value).item() for value in (-0.6, 0.5))
    schedule = SolverSchedule(times=(t, usual if s is None else s), steps=(step,))
    (row,) = Tableau.build(schedule, noise).stages[0].rows
    return dict(row.terms), row.noise


@families
@pytest.mark.parametrize("eta", [0.2, 0.9, 1.0])
def test_eta_is_the_tau_with_the_same_decay(eta: float, noise: NoiseSchedule) -> None:
    tau = math.sqrt(-0.5 * math.log1p(eta**2 * math.expm1(-2.2)) / 1.1)
    assert eta < 1 or tau == pytest.approx(1.0)
    by_eta = _one(noise, StepStrategy(noise=Noise(kind="eta", amount=eta)))
    by_tau = _one(noise, StepStrategy(noise=Noise(kind="tau", amount=tau)))
    assert by_eta[0] == pytest.approx(by_tau[0], rel=1e-10)
    assert by_eta[1] == pytest.approx(by_tau[1], rel=1e-10)


@families
@pytest.mark.parametrize("kind", ["eta", "tau"])
def test_no_noise_is_the_ode(kind: Any, noise: NoiseSchedule) -> None:
    silent = _one(noise, StepStrategy(noise=Noise(kind=kind, amount=0.0)))
    assert silent[0] == pytest.approx(_one(noise, StepStrategy())[0], rel=1e-13)
    assert silent[1] == 0.0
    assert _one(noise, StepStrategy(noise=Noise(kind=kind)), s=0.0) == _one(noise, StepStrategy(), s=0.0)


@families
def test_the_scale_multiplies_the_noise_alone(noise: NoiseSchedule) -> None:
    plain, louder = (_one(noise, StepStrategy(noise=Noise(amount=0.7, scale=scale))) for scale in (1.0, 1.1))
    assert louder[0] == plain[0]
    assert louder[1] == pytest.approx(1.1 * plain[1], rel=1e-14)


@families
def test_fresh_noise_replaces_all_of_it(noise: NoiseSchedule, chain: Any) -> None:
    alpha, sigma, _ = chain.levels(noise, noise.t_of_lam(0.5).item())
    terms, spread = _one(noise, StepStrategy(noise=Noise(kind="fresh", scale=1.1)))
    assert terms == {"d0": pytest.approx(alpha, rel=1e-14)}
    assert spread == pytest.approx(1.1 * sigma, rel=1e-14)


@families
def test_going_back_is_the_forward_process(noise: NoiseSchedule, chain: Any) -> None:
    """From the marginal at s the step that only adds noise makes the marginal at t, and x_t correlates as it should."""
    top, s, t = (noise.t_of_lam(value).item() for value in (-1.0, 0.8, -0.3))
    back = StepStrategy(eval=Evaluation(source="none"))
    schedule = SolverSchedule(times=(top, s, t, s), steps=(StepStrategy(), back, StepStrategy()))
    assert schedule.nfe == 2
    assert schedule.stochastic
    row = Tableau.build(schedule, noise).stages[0].rows[-1]
    assert [row.target, *(name for name, _ in row.terms)] == ["x2", "x1"]
    ratio = row.terms[0][1]
    assert ratio == pytest.approx(chain.levels(noise, t)[0] / chain.levels(noise, s)[0], rel=1e-14)
    mean, variance = chain.marginal(noise, s)
    assert (ratio * mean, ratio**2 * variance + row.noise**2) == pytest.approx(chain.marginal(noise, t), rel=1e-12)

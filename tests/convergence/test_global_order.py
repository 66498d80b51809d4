"""Error of whole runs on the linear ODE of Gaussian data: twice the steps divide it by 2^order.

Multistep runs start from exact states: a first-order start would cap them at second order. Errors are taken together
over several Gaussians, since for a single one the error changes sign with the number of steps.
"""

import dataclasses
import math

import msgspec
import pytest
import torch

from samplers import Engine, NoiseSchedule, SolverSchedule, Tableau, parse_recipe, sample
from samplers.testing import GaussianFlow

VP = NoiseSchedule.vp_linear()
CASES = [
    ("ddim", 40, 1),
    ("dpmpp:order=2", 60, 2),
    ("dpmpp:order=2,method=singlestep", 60, 2),
    ("dpmpp:order=3", 60, 2),
    ("dpmpp:order=3,taylor=true", 60, 3),
    ("deis:order=3", 60, 3),
    ("deis:order=3,axis=t", 120, 3),
    ("deis:order=2,axis=sigma", 120, 2),
    ("unipc:order=2,corrector=false", 60, 2),
    ("unipc:order=1", 60, 2),
    ("unipc:order=2", 60, 3),
    ("unipc:order=3,pred=eps", 60, 4),
]


def _error(text: str, n: int, low: float = -1.5, high: float = 1.5) -> float:
    parsed = parse_recipe(text)
    options = {**parsed.options}
    if "lower_order_final" in options:
        options["lower_order_final"] = False
    t = VP.t_of_lam(torch.linspace(low, high, n + 1, dtype=torch.float64))
    parsed = dataclasses.replace(parsed, options=options)
    steps = list(parsed.schedule(VP, n, at=tuple(t.tolist())).steps)
    exact = int(options.get("order", 1)) if options.get("method") != "singlestep" else 1
    for j in range(exact - 1):  # an exact state needs no correction
        steps[j] = msgspec.structs.replace(steps[j], corr=None)
    schedule = SolverSchedule(times=tuple(t.tolist()), steps=tuple(steps))
    flow = GaussianFlow(VP)
    first = flow.start(t[0])
    engine = Engine(Tableau.build(schedule, VP), first)
    for j in range(n):
        x = flow.solve(first, t[0], t[j]) if j < exact else engine.x
        engine.tell(flow.denoise(x, t[j]), x)
    return (engine.x - flow.solve(first, t[0], t[-1])).norm().item()


@pytest.mark.parametrize(("text", "n", "order"), CASES)
def test_error_halves_to_the_order(text: str, n: int, order: int) -> None:
    assert math.log2(_error(text, n) / _error(text, 2 * n)) == pytest.approx(order, abs=0.25)


def test_ipndm_on_its_even_grid() -> None:
    errors = []
    for n in (100, 200):
        ratio = torch.linspace(2.0, 0.5, n + 1, dtype=torch.float64)
        t = VP.t_of_lam(-ratio.log())
        schedule = parse_recipe("ipndm:order=2").schedule(VP, n, at=tuple(t.tolist()))
        flow = GaussianFlow(VP)
        x = flow.start(t[0])
        out = sample(flow.denoise, x, schedule, VP)
        errors.append((out - flow.solve(x, t[0], t[-1])).norm().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.25)


@pytest.mark.parametrize("text", ["ddim", "dpmpp:order=3,taylor=true", "unipc:order=3", "deis:order=3", "ipndm:order=4"])
@pytest.mark.parametrize(
    "noise", [NoiseSchedule.vp_linear(), NoiseSchedule.edm(), NoiseSchedule.flow()], ids=lambda noise: noise.kind
)
def test_a_run_from_the_public_facade_converges_to_the_exact_map(text: str, noise: NoiseSchedule) -> None:
    flow = GaussianFlow(noise)
    errors = []
    for nfe in (10, 40, 160):
        schedule = parse_recipe(text).schedule(noise, nfe)
        t = torch.tensor(schedule.times, dtype=torch.float64)
        x = flow.start(t[0])
        errors.append((sample(flow.denoise, x, schedule, noise) - flow.solve(x, t[0], t[-1])).norm().item())
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < (0.2 if text == "ddim" else 0.01)

"""Local truncation error with exact history: its slope is the declared order + 1, for every recipe and option."""

import itertools

import msgspec
import pytest
import torch

from samplers import RECIPES, NoiseSchedule, Residual, StepStrategy
from samplers.testing import GaussianFlow, local_errors, local_order, recipe_steps
from samplers.testing.orders import UNEVEN

NOISE = {
    "vp": NoiseSchedule.vp_linear(),
    "cosine": NoiseSchedule.vp_cosine(),
    "edm": NoiseSchedule.edm(),
    "flow": NoiseSchedule.flow(),
}
UNIPC = [
    f"unipc:order={order},variant={variant},pred={pred}"
    for order, variant, pred in itertools.product((1, 2, 3, 4), ("bh1", "bh2"), ("x0", "eps"))
]
TEXTS = [
    "ddim",
    "euler",
    "dpmpp:order=1",
    *(
        f"dpmpp:order=2,method={method},solver_type={kind}"
        for method, kind in itertools.product(("multistep", "singlestep"), ("midpoint", "heun"))
    ),
    "dpmpp:order=3",
    "dpmpp:order=3,taylor=true",
    "dpmpp:order=3,method=singlestep",
    "dpmpp:order=3,method=singlestep,solver_type=heun",
    *(f"dpm:order={order},method={method}" for order, method in itertools.product((1, 2, 3), ("multistep", "singlestep"))),
    "ddim:eta=0",
    "euler_ancestral:eta=0",
    "heun",
    "kdpm2",
    "kdpm2:pred=x0",
    *UNIPC,
    *(f"dpm_v3:order={order},pseudo={pseudo}" for order, pseudo in itertools.product((1, 2, 3), ("true", "false"))),
    *(f"deis:order={order},axis={axis}" for order, axis in itertools.product((1, 2, 3, 4), ("lambda", "t", "sigma"))),
    *(f"lms:order={order}" for order in (1, 2, 3, 4)),
    *(f"sa_solver:order={order},tau=0" for order in (1, 2, 3)),
    *(f"ipndm:order={order}" for order in (1, 2, 3, 4)),
    *(f"pndm:order={order}" for order in (2, 3, 4)),
]
STOCHASTIC = ["ddpm", "dpmpp_sde", "restart", "lcm", "tcd"]  # no order of a deterministic kind is declared
# Single-step orders of 3 need their inner nodes at thirds; "even" here is that.
EVEN_ONLY = [text for text in TEXTS if "order=3,method=singlestep" in text]
ANY_GRID = [text for text in TEXTS if not text.startswith(("ipndm", "pndm")) and text not in EVEN_ONLY]
BAND = 0.2


def test_every_recipe_is_measured() -> None:
    assert {text.partition(":")[0] for text in [*TEXTS, *STOCHASTIC]} == set(RECIPES)
    for name in STOCHASTIC:
        assert RECIPES[name].order(RECIPES[name].defaults) is None


@pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)
@pytest.mark.parametrize("text", TEXTS)
def test_local_order_on_the_declared_grid(text: str, noise: NoiseSchedule) -> None:
    steps, declared, grid = recipe_steps(text, noise)
    assert local_order(steps, noise, grid=grid) == pytest.approx(declared, abs=BAND)


@pytest.mark.parametrize("text", ANY_GRID)
def test_a_recipe_for_any_grid_keeps_its_order_on_an_uneven_one(text: str) -> None:
    steps, declared, grid = recipe_steps(text, NOISE["vp"])
    assert grid == "lambda"
    assert local_order(steps, NOISE["vp"], at=1.0, ratios=UNEVEN) == pytest.approx(declared, abs=BAND)


@pytest.mark.parametrize("text", EVEN_ONLY)
def test_third_order_single_steps_are_second_order_between_uneven_nodes(text: str) -> None:
    steps, _, _ = recipe_steps(text, NOISE["vp"])
    widths = [0.002 * 2 ** (k / 4) for k in range(7)]
    assert local_order(steps, NOISE["vp"], ratios=UNEVEN, widths=widths) == pytest.approx(2, abs=BAND)


@pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)
@pytest.mark.parametrize("text", UNIPC)
def test_the_corrector_gains_one_order(text: str, noise: NoiseSchedule) -> None:
    steps, declared, _ = recipe_steps(text, noise, corrected=True)
    assert steps[-1].corr is not None
    assert local_order(steps, noise, ratios=UNEVEN) == pytest.approx(declared + 1, abs=BAND)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_ipndm_is_first_order_off_its_grid(order: int) -> None:
    steps, _, _ = recipe_steps(f"ipndm:order={order}", NOISE["vp"])
    assert local_order(steps, NOISE["vp"], grid="sigma", ratios=UNEVEN) == pytest.approx(1, abs=BAND)


@pytest.mark.parametrize("pred", [(0.3, 0.0), (0.5, -0.5), (1.4, 0.2)])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_the_predictions_between_x0_and_eps_have_their_order(order: int, pred: tuple[float, float]) -> None:
    steps = [StepStrategy(order=min(order, i + 1), pred=pred) for i in range(order)]
    assert local_order(steps, NOISE["vp"], ratios=UNEVEN) == pytest.approx(order, abs=BAND)


@pytest.mark.parametrize("axis", ["sigma", "t"])
@pytest.mark.parametrize("order", [2, 3, 4])
def test_data_prediction_on_other_axes_has_its_order(order: int, axis: str) -> None:
    steps = [StepStrategy(order=min(order, i + 1), axis=axis) for i in range(order)]
    assert local_order(steps, NOISE["vp"], ratios=UNEVEN) == pytest.approx(order, abs=BAND)


@pytest.mark.parametrize(
    ("order", "d_nodes", "expected"), [(3, (1,), 2), (4, (1,), 2), (4, (2,), 3), (4, (None, 2), 3), (4, (3, 3, 3), 4)]
)
def test_a_low_order_derivative_lowers_the_order(order: int, d_nodes: tuple[int, ...], expected: int) -> None:
    steps = [StepStrategy(order=min(order, i + 1)) for i in range(order)]
    steps[-1] = msgspec.structs.replace(steps[-1], d_nodes=d_nodes)
    assert local_order(steps, NOISE["vp"], ratios=UNEVEN) == pytest.approx(expected, abs=BAND)


@pytest.mark.parametrize("start", [-2, -3])
def test_restarting_from_an_earlier_node_keeps_the_order(start: int) -> None:
    # The nodes between the start and the end are predicted by lower orders, as in single-step methods.
    steps = [StepStrategy(), StepStrategy(), StepStrategy(order=2, start=start)]
    assert local_order(steps, NOISE["vp"]) == pytest.approx(2, abs=BAND)


@pytest.mark.parametrize(
    ("step", "measured"),
    [
        (StepStrategy(order=2, relax=("half",)), 1),
        (StepStrategy(order=3, relax=("half",)), 1),
        (StepStrategy(order=3, relax=(None, "half")), 2),
        (StepStrategy(order=3, delta=Residual(x0=(0.0, 1e-4, -1e-4))), None),
        (StepStrategy(order=3, delta=Residual(x=(0.0, 0.0, 1e-5))), None),
    ],
)
def test_a_wrong_weight_shows_in_the_slope(step: StepStrategy, measured: int | None) -> None:
    order = local_order([StepStrategy(), StepStrategy(order=2), step], NOISE["vp"])
    if measured is None:
        assert order < step.order - 0.5
    else:
        assert order == pytest.approx(measured, abs=BAND)


@pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)
def test_the_reference_solution_solves_the_ode(noise: NoiseSchedule) -> None:
    """d(x / alpha) = -(x / alpha - x0) d(lambda), by a central difference."""
    flow, width = GaussianFlow(noise), 1e-4
    t = noise.t_of_lam(torch.tensor([-width, 0.0, width], dtype=torch.float64))
    x = flow.start(t[1])
    ends = [flow.solve(x, t[1], t[k]) / noise.alpha(t[k]) for k in (0, 2)]
    rate = (ends[1] - ends[0]) / (2 * width)
    torch.testing.assert_close(rate, flow.denoise(x, t[1]) - x / noise.alpha(t[1]), rtol=1e-7, atol=1e-7)


def test_errors_are_of_the_last_step_alone() -> None:
    """Bad earlier steps do not matter, since their states are replaced by exact ones."""
    good = [StepStrategy(), StepStrategy(order=2)]
    bad = [StepStrategy(delta=Residual(x0=(1.0,))), StepStrategy(order=2)]
    assert local_errors(good, NOISE["vp"]) == pytest.approx(local_errors(bad, NOISE["vp"]), rel=1e-9)

"""Solvers that draw noise, evaluate inside a step or run on other grids, against diffusers' own classes over whole runs.

Both sides draw from equal generators, one per step: ours draws where there is noise to add, some of theirs always do.
"""

import inspect
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    SASolverScheduler,
    SchedulerMixin,
    TCDScheduler,
)
from torch import Tensor

from samplers import RECIPES, NoiseSchedule, SolverSchedule, Tableau, parse_recipe, recipe
from samplers.schedulers import SolverScheduler

ROOTED = (EulerAncestralDiscreteScheduler, HeunDiscreteScheduler, KDPM2DiscreteScheduler, LMSDiscreteScheduler)
TWICE = (HeunDiscreteScheduler, KDPM2DiscreteScheduler, FlowMatchHeunDiscreteScheduler)

DDPM: list[dict[str, Any]] = [
    {"clip_sample": False},
    {"clip_sample": True},
    {"clip_sample": False, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
    {"clip_sample": False, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"},
]
SPACED: list[dict[str, Any]] = [
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "leading", "steps_offset": 1, "beta_schedule": "scaled_linear"},
    {"timestep_spacing": "trailing", "prediction_type": "v_prediction"},
]
MIN = {"final_sigmas_type": "sigma_min"}


def _loop(scheduler: SchedulerMixin, x: Tensor, model: Any, **extra: Any) -> Tensor:
    takes = inspect.signature(scheduler.step).parameters
    for i, t in enumerate(scheduler.timesteps):
        model_input = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        options = {key: value for key, value in extra.items() if key in takes}
        if "generator" in takes:
            options["generator"] = torch.Generator().manual_seed(100 + i)
        x = scheduler.step(model(model_input, t), t, x, return_dict=False, **options)[0]
    return x


def _runs(theirs: SchedulerMixin, text: str, n: int, x: Tensor, model: Any, **extra: Any) -> tuple[Tensor, Tensor]:
    """Results of a whole run of both, in the model's scaling."""
    ours = SolverScheduler.from_config(theirs.config, schedule=text)
    theirs.set_timesteps(n)
    ours.set_timesteps(2 * n - 1 if isinstance(theirs, TWICE) else n)
    assert len(ours.timesteps) == len(theirs.timesteps)
    start = end = 1.0
    if isinstance(theirs, ROOTED):  # their state is x_t / alpha
        start, end = ((theirs.sigmas[i] ** 2 + 1) ** 0.5 for i in (0, -1))
    expected = _loop(theirs, x * start, model, **extra) / end
    assert expected.isfinite().all(), "the in-tree result is not finite: nothing to compare with"
    return _loop(ours, x, model), expected


def _agree(theirs: SchedulerMixin, text: str, n: int, x: Tensor, tools: Any, timeless: bool = False, **extra: Any) -> None:
    got, expected = _runs(theirs, text, n, x, tools.timeless if timeless else tools.model, **extra)
    assert tools.relative(got, expected) < tools.limit


# In-tree classes warn that they would rather not be given the noise form.
pytestmark = pytest.mark.filterwarnings("ignore:.*algorithm_type.* is deprecated:FutureWarning")
steps = pytest.mark.parametrize("n", [1, 5, 12])
some = pytest.mark.parametrize("n", [2, 5, 12])  # one step from the noisiest level cancels in their float32
long_too = pytest.mark.parametrize("n", [2, 5, 12, 16])


@steps
@pytest.mark.parametrize("options", DDPM)
def test_ddpm(options: dict[str, Any], n: int, x: Tensor, tools: Any) -> None:
    _agree(DDPMScheduler(**options), "ddpm", n, x, tools)


@pytest.mark.parametrize("n", [1, 5, 10])  # divisors of 1000: elsewhere theirs steps to times that it does not evaluate
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("options", [*DDPM, {"clip_sample": False, "set_alpha_to_one": False}])
def test_ddim_with_eta(options: dict[str, Any], eta: float, n: int, x: Tensor, tools: Any) -> None:
    _agree(DDIMScheduler(**options), f"ddim:eta={eta}", n, x, tools, eta=eta)


@some
@pytest.mark.parametrize("options", SPACED)
def test_euler_ancestral(options: dict[str, Any], n: int, x: Tensor, tools: Any) -> None:
    _agree(EulerAncestralDiscreteScheduler(**options), "euler_ancestral", n, x, tools)


RAMPS = ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"]


@pytest.mark.parametrize("flag", RAMPS)
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize(
    ("cls", "text"),
    [
        (EulerDiscreteScheduler, "euler"),
        (HeunDiscreteScheduler, "heun"),
        (LMSDiscreteScheduler, "lms"),
        (DPMSolverMultistepScheduler, "dpmpp:order=2"),
    ],
)
def test_named_grids_of_every_spacing(cls: type[SchedulerMixin], text: str, spacing: str, flag: str) -> None:
    """Euler's kind runs between the noise levels that spacing picks; DPM-Solver's kind between those of all training steps."""
    theirs = cls(timestep_spacing=spacing, steps_offset=int(spacing == "leading"), **{flag: True})
    ours = SolverScheduler.from_config(theirs.config, schedule=text)
    for n in (2, 7):
        theirs.set_timesteps(n)
        ours.set_timesteps(len(theirs.timesteps))
        torch.testing.assert_close(ours.sigmas.unique(), theirs.sigmas.unique(), rtol=1e-5, atol=0)


def test_named_grids_between_given_noise_levels() -> None:
    theirs = EulerDiscreteScheduler(use_karras_sigmas=True, sigma_min=0.1, sigma_max=60.0)
    ours = SolverScheduler.from_config(theirs.config, schedule="euler")
    theirs.set_timesteps(6)
    ours.set_timesteps(6)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match=r"sigma_max 700\.0 lies outside the noise levels"):
        SolverScheduler.from_config({**theirs.config, "sigma_max": 700.0}, schedule="euler").set_timesteps(6)


VIDEO = {"prediction_type": "v_prediction", "timestep_type": "continuous", "sigma_min": 0.002, "sigma_max": 700.0}


@pytest.mark.parametrize("flag", ["use_karras_sigmas", "use_exponential_sigmas"])
@pytest.mark.parametrize("n", [5, 25])
def test_continuous_v_prediction(n: int, flag: str, x: Tensor, tools: Any) -> None:
    """Stable Video Diffusion: betas in its config, and a network on EDM's clock."""
    theirs = EulerDiscreteScheduler(**VIDEO, **{flag: True}, beta_schedule="scaled_linear", timestep_spacing="leading")
    ours = SolverScheduler.from_config(theirs.config, schedule="euler")
    theirs.set_timesteps(n)
    ours.set_timesteps(n)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-6, atol=0)
    assert ours.init_noise_sigma == pytest.approx(float(theirs.init_noise_sigma), rel=1e-6)

    def model(state: Tensor, t: Tensor) -> Tensor:
        return tools.model(state, 100 * t)

    expected = tools.loop(theirs, x * theirs.init_noise_sigma, model)
    assert tools.relative(tools.loop(ours, x * ours.init_noise_sigma, model), expected) < 2 * tools.limit
    again = SolverScheduler.from_config(EulerDiscreteScheduler.from_config(ours.config).config)
    assert (again.config.family, again.config.sigma_data, again.config.sigma_max) == ("edm", 1.0, 700.0)


def test_continuous_v_prediction_without_its_noise_levels() -> None:
    with pytest.raises(ValueError, match="set them"):
        SolverScheduler.from_config(EulerDiscreteScheduler(**VIDEO).config)


@long_too
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("kind", ["dpmsolver", "sde-dpmsolver", "sde-dpmsolver++"])
def test_multistep(kind: str, order: int, solver_type: str, n: int, x: Tensor, tools: Any) -> None:
    name, tau = "dpmpp" if kind.endswith("++") else "dpm", int(kind.startswith("sde"))
    end = {} if name == "dpmpp" else MIN
    theirs = DPMSolverMultistepScheduler(solver_order=order, algorithm_type=kind, solver_type=solver_type, **end)
    _agree(theirs, f"{name}:order={order},method=multistep,solver_type={solver_type},tau={tau}", n, x, tools)


@long_too
def test_multistep_of_order_three_in_the_noise_form(n: int, x: Tensor, tools: Any) -> None:
    theirs = DPMSolverMultistepScheduler(solver_order=3, algorithm_type="dpmsolver", **MIN)
    _agree(theirs, "dpm:order=3,method=multistep", n, x, tools)


@pytest.mark.parametrize("n", [5, 12, 16])
def test_sde_of_order_three_by_the_name_of_its_deviation(n: int, x: Tensor, tools: Any) -> None:
    """In-tree SDE order 3 has a term of the opposite sign: it is available, and it is not the default."""
    theirs = DPMSolverMultistepScheduler(solver_order=3, algorithm_type="sde-dpmsolver++", final_sigmas_type="sigma_min")
    _agree(theirs, "dpmpp:order=3,tau=1,as_in_diffusers=true", n, x, tools)
    got, expected = _runs(theirs, "dpmpp:order=3,tau=1", n, x, tools.model)
    assert tools.relative(got, expected) > 1e-3


@pytest.mark.parametrize("end", ["zero", "sigma_min"])
def test_sde_of_order_three_tends_to_the_ode_rule(end: str) -> None:
    """As tau goes to 0 the default's coefficients become those of DPM-Solver++(3M); the in-tree sign leads elsewhere."""
    noise = NoiseSchedule.vp_linear()
    ode = recipe(f"dpmpp:order=3,final={end}", noise, 20)
    for tail, same in (("", True), (",as_in_diffusers=true", False)):
        near = recipe(f"dpmpp:order=3,tau=1e-6,final={end}{tail}", noise, 20)
        assert near.times == ode.times
        assert (_rows(near, noise, 6) == pytest.approx(_rows(ode, noise, 6), rel=1e-8, abs=1e-8)) is same


def _rows(schedule: SolverSchedule, noise: NoiseSchedule, i: int) -> dict[str, float]:
    (row,) = Tableau.build(schedule, noise).stages[i].rows
    return dict(row.terms)


@pytest.mark.parametrize("n", [3, 6, 7, 8, 12, 17])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("kind", ["dpmsolver", "dpmsolver++"])
def test_singlestep(kind: str, order: int, solver_type: str, n: int, x: Tensor, tools: Any) -> None:
    end = {} if kind.endswith("++") else MIN
    theirs = DPMSolverSinglestepScheduler(
        solver_order=order, algorithm_type=kind, solver_type=solver_type, lower_order_final=True, **end
    )
    name = "dpmpp" if kind.endswith("++") else "dpm"
    _agree(theirs, f"{name}:order={order},method=singlestep,solver_type={solver_type}", n, x, tools)


@some
@pytest.mark.parametrize("options", SPACED)
def test_heun(options: dict[str, Any], n: int, x: Tensor, tools: Any) -> None:
    _agree(HeunDiscreteScheduler(**options), "heun", n, x, tools)


@some
@pytest.mark.parametrize("options", SPACED)
def test_kdpm2(options: dict[str, Any], n: int, x: Tensor, tools: Any) -> None:
    """Their timesteps at the midpoints are interpolated in another variable, so the model ignores the time."""
    _agree(KDPM2DiscreteScheduler(**options), "kdpm2", n, x, tools, timeless=True)


@some
@pytest.mark.parametrize("options", SPACED)
def test_lms(options: dict[str, Any], n: int, x: Tensor, tools: Any) -> None:
    _agree(LMSDiscreteScheduler(**options), "lms", n, x, tools)


@pytest.mark.parametrize("n", [4, 5, 12])  # their slopes (x - x0) / sigma lose digits where two steps span everything
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_heun(shift: float, n: int, x: Tensor, tools: Any) -> None:
    _agree(FlowMatchHeunDiscreteScheduler(shift=shift), "heun", n, x, tools)


@pytest.mark.parametrize("n", [3, 5, 12])
@pytest.mark.parametrize("tau", ["tau=0", "tau=1,low=0,high=1", "tau=0.6,low=0,high=1", "tau=1"])
@pytest.mark.parametrize("order", [(1, 2), (2, 2), (3, 3), (3, 2), (2, 4)], ids=str)
def test_sa_solver(order: tuple[int, int], tau: str, n: int, x: Tensor, tools: Any) -> None:
    """In double precision: their coefficients cancel in float32."""
    amount = float(tau.partition(",")[0].removeprefix("tau="))
    window = (200, 800) if tau == "tau=1" else (0, 1000)
    theirs = SASolverScheduler(
        predictor_order=order[0],
        corrector_order=order[1],
        tau_func=lambda t: amount if window[0] <= t <= window[1] else 0,
    )
    config = {key: value for key, value in theirs.config.items() if key != "tau_func"}
    ours = SolverScheduler.from_config(
        config, schedule=f"sa_solver:order={order[0]},corrector={order[1]},{tau},final=sigma_min"
    )
    theirs.set_timesteps(n)
    ours.set_timesteps(n)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps.float(), rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=2e-6, atol=0)
    cumprod = theirs.alphas_cumprod.double()[[*theirs.timesteps.tolist(), 0]]
    exact = ((1 - cumprod) / cumprod).sqrt()
    theirs.sigmas = exact
    expected = _loop(theirs, x.double(), tools.model)
    assert tools.relative(_loop(ours, x.double(), tools.model), expected) < 1e-10


@pytest.mark.parametrize("n", [1, 4, 8])
@pytest.mark.parametrize("options", [{}, {"clip_sample": True}, {"prediction_type": "v_prediction"}])
def test_lcm(options: dict[str, Any], n: int, x: Tensor, tools: Any) -> None:
    """LCM's boundary scalings c_skip and c_out are 0 and 1 to float32 but at the smallest times."""
    _agree(LCMScheduler(**options), "lcm", n, x, tools)


@pytest.mark.parametrize("n", [1, 4, 8])
@pytest.mark.parametrize("eta", [0.0, 0.3, 0.8])
def test_tcd(eta: float, n: int, x: Tensor, tools: Any) -> None:
    _agree(TCDScheduler(), f"tcd:eta={eta}", n, x, tools, eta=eta)


@pytest.mark.parametrize("n", [2, 5, 12])
@pytest.mark.parametrize("kind", ["dpmsolver++", "sde-dpmsolver++"])
@pytest.mark.parametrize("flag", ["use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"])
def test_grids(flag: str, kind: str, n: int, x: Tensor, tools: Any) -> None:
    """Their timesteps are rounded, so the model ignores the time."""
    theirs = DPMSolverMultistepScheduler(algorithm_type=kind, **{flag: True})
    text = f"dpmpp:order=2,tau={int(kind.startswith('sde'))}"
    ours = SolverScheduler.from_config(theirs.config, schedule=text)
    theirs.set_timesteps(n)
    ours.set_timesteps(n)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-5, atol=0)
    _agree(theirs, text, n, x, tools, timeless=True)


def test_every_stochastic_recipe_with_a_class_is_compared() -> None:
    """A new one with a class in diffusers needs a test above, or (dpmpp_sde) among those of Brownian noise."""
    covered = {"ddpm", "euler_ancestral", "sa_solver", "lcm", "tcd", "dpmpp_sde"}
    found = {
        name
        for name, one in RECIPES.items()
        if "diffusers" in one.known_as and parse_recipe(name).schedule(NoiseSchedule.vp_linear(), 8).stochastic
    }
    assert found == covered

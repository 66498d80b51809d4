"""Flow and EDM models: `SolverScheduler` against the in-tree classes, in float32, in the loop of a pipeline."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from torch import Tensor

from samplers import NoiseSchedule, parse_recipe
from samplers.schedulers import SolverScheduler

STEPS = (4, 10, 20)
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


def _on_its_sigmas(theirs: SchedulerMixin, recipe: str, steps: int) -> SolverScheduler:
    """Ours on the sigmas that an in-tree flow scheduler has chosen."""
    schedule = parse_recipe(recipe).schedule(NoiseSchedule.flow(), steps, at=tuple(theirs.sigmas.tolist()))
    ours = SolverScheduler.from_config(theirs.config, schedule=schedule.to_dict())
    ours.set_timesteps(steps)
    return ours


# ---- flow match Euler --------------------------------------------------------------------------------------------

FLOW_OPTIONS = [
    ({}, None),
    ({"shift": 3.0}, None),
    ({"shift": 7.0}, None),
    ({"use_dynamic_shifting": True}, 0.5),
    ({"use_dynamic_shifting": True, "shift": 3.0}, 1.15),
    ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, 1.3),
    ({"use_dynamic_shifting": True, "shift_terminal": 0.1}, 1.15),
    ({"shift": 3.0, "shift_terminal": 0.02}, None),
    ({"shift": 3.0, "use_karras_sigmas": True}, None),
    ({"shift": 3.0, "use_exponential_sigmas": True}, None),
]


def _flow_pair(options: dict[str, Any], recipe: str = "euler") -> tuple[SchedulerMixin, SolverScheduler]:
    theirs = FlowMatchEulerDiscreteScheduler(**options)
    return theirs, SolverScheduler.from_config(theirs.config, schedule=recipe)


def _same_grid(theirs: SchedulerMixin, ours: SolverScheduler) -> None:
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("recipe", ["euler", "ddim", "dpmpp:order=1"])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("options", "mu"), FLOW_OPTIONS)
def test_flow_match_euler(options: dict[str, Any], mu: float | None, steps: int, recipe: str, x: Tensor, tools: Any) -> None:
    theirs, ours = _flow_pair(options, recipe)
    theirs.set_timesteps(steps, mu=mu)
    ours.set_timesteps(steps, mu=mu)
    _same_grid(theirs, ours)
    assert tools.difference(theirs, ours, x) < tools.limit


@pytest.mark.parametrize("as_array", [True, False])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("options", "mu"), FLOW_OPTIONS)
def test_flow_match_euler_with_the_pipelines_sigmas(
    options: dict[str, Any], mu: float | None, steps: int, as_array: bool, x: Tensor, tools: Any
) -> None:
    sigmas = np.linspace(1.0, 1 / steps, steps)
    theirs, ours = _flow_pair(options)
    theirs.set_timesteps(sigmas=sigmas, mu=mu)
    ours.set_timesteps(sigmas=sigmas if as_array else sigmas.tolist(), mu=mu)
    _same_grid(theirs, ours)
    assert tools.difference(theirs, ours, x) < tools.limit


def test_sigmas_may_end_in_zero(x: Tensor, tools: Any) -> None:
    theirs, ours = _flow_pair({"shift": 3.0})
    theirs.set_timesteps(sigmas=[1.0, 0.6, 0.2])
    ours.set_timesteps(3, sigmas=[1.0, 0.6, 0.2, 0.0])
    _same_grid(theirs, ours)
    assert tools.difference(theirs, ours, x) < tools.limit


def test_mu_is_required_and_may_be_unused() -> None:
    _, ours = _flow_pair({"use_dynamic_shifting": True})
    with pytest.raises(ValueError, match="mu"):
        ours.set_timesteps(4)
    _, ours = _flow_pair({"shift": 3.0})
    ours.set_timesteps(4)
    expected = ours.timesteps
    ours.set_timesteps(4, mu=0.7)
    assert torch.equal(ours.timesteps, expected)


# ---- higher orders on flow models --------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("shift", [1.0, 3.0, 7.0])
def test_unipc_flow(shift: float, order: int, steps: int, x: Tensor, tools: Any) -> None:
    """The in-tree class truncates the times to whole numbers, so the model must not look at them."""
    theirs = UniPCMultistepScheduler(solver_order=order, flow_shift=shift, **FLOW)
    ours = SolverScheduler.from_config(theirs.config, schedule=f"unipc:order={order}")
    theirs.set_timesteps(steps)
    ours.set_timesteps(steps)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=0, atol=2e-6)  # they start at 1 - 1e-6
    assert tools.difference(theirs, ours, x, timeless=True) < tools.limit


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("options", [{"use_dynamic_shifting": True}, {"use_dynamic_shifting": True, "shift_terminal": 0.1}])
def test_unipc_flow_with_mu(options: dict[str, Any], steps: int, x: Tensor, tools: Any) -> None:
    theirs = UniPCMultistepScheduler(solver_order=2, **options, **FLOW)
    ours = SolverScheduler.from_config(theirs.config, schedule="unipc")
    theirs.set_timesteps(steps, mu=1.15)
    ours.set_timesteps(steps, mu=1.15)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=0, atol=2e-6)
    assert tools.difference(theirs, ours, x, timeless=True) < tools.limit


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("order", "solver_type"), [(1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint")])
def test_dpmpp_flow(order: int, solver_type: str, steps: int, x: Tensor, tools: Any) -> None:
    """On the in-tree class's own sigmas, which begin one training step below 1."""
    theirs = DPMSolverMultistepScheduler(solver_order=order, solver_type=solver_type, flow_shift=3.0, **FLOW)
    theirs.set_timesteps(steps)
    ours = _on_its_sigmas(theirs, f"dpmpp:order={order},solver_type={solver_type}", steps)
    assert tools.difference(theirs, ours, x, timeless=True) < tools.limit


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_first_sigma_of_dpmpp_flow_is_ours_to_one_training_step(order: int) -> None:
    theirs = DPMSolverMultistepScheduler(solver_order=order, **FLOW)
    ours = SolverScheduler.from_config(theirs.config, schedule=f"dpmpp:order={order}")
    theirs.set_timesteps(10)
    ours.set_timesteps(10)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=0, atol=1.001e-3)


# ---- EDM ---------------------------------------------------------------------------------------------------------


EDM = [
    (EDMEulerScheduler, "euler", {}),
    (EDMDPMSolverMultistepScheduler, "dpmpp", {"final_sigmas_type": "sigma_min", "sigma_min": 0.01}),
    (EDMDPMSolverMultistepScheduler, "dpmpp", {"final_sigmas_type": "sigma_min", "sigma_schedule": "exponential"}),
    (EDMEulerScheduler, "ddim", {"sigma_data": 1.0, "sigma_max": 40.0, "rho": 5.0}),
    (EDMEulerScheduler, "euler", {"sigma_schedule": "exponential"}),
    (EDMEulerScheduler, "euler", {"prediction_type": "v_prediction"}),
    *((EDMDPMSolverMultistepScheduler, f"dpmpp:order={order}", {"solver_order": order}) for order in (1, 2, 3)),
    (EDMDPMSolverMultistepScheduler, "dpmpp:solver_type=heun", {"solver_type": "heun"}),
    (EDMDPMSolverMultistepScheduler, "dpmpp", {"prediction_type": "v_prediction", "sigma_schedule": "exponential"}),
    (EDMDPMSolverMultistepScheduler, "dpmpp", {"thresholding": True, "sample_max_value": 1.3}),
    (
        EDMDPMSolverMultistepScheduler,
        "dpmpp:order=3,lower_order_final=false",
        {"solver_order": 3, "lower_order_final": False},
    ),
]


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("cls", "recipe", "options"), EDM)
def test_edm(cls: type[SchedulerMixin], recipe: str, options: dict[str, Any], steps: int, x: Tensor, tools: Any) -> None:
    tools.agree(cls, recipe, options, steps, x)


@pytest.mark.parametrize("options", [{}, {"sigma_max": 40.0, "sigma_data": 1.0}])
def test_edm_scales_of_the_state(options: dict[str, Any], x: Tensor, tools: Any) -> None:
    theirs, ours = tools.pair(EDMEulerScheduler, "euler", options, 5)
    assert ours.init_noise_sigma == pytest.approx(float(theirs.init_noise_sigma), rel=1e-6)
    t = theirs.timesteps[0]
    torch.testing.assert_close(ours.scale_model_input(x, t), theirs.scale_model_input(x, t))

"""Variance preserving models: `SolverScheduler` against the in-tree class it replaces, float32, in a pipeline's loop.

First-order schedulers and DPM-Solver++; UniPC and DEIS have their own file. Each comparison is of whole runs over a
nonlinear model. The limit is float32 rounding; the grids must agree as well.
"""

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from torch import Tensor

from samplers import NoiseSchedule, parse_recipe
from samplers.schedulers import SolverScheduler

STEPS = [4, 10, 20]
PREDICTIONS = ("epsilon", "sample", "v_prediction")
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
BETAS = [0.002 * (i + 1) for i in range(50)]
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
ZERO_SNR = {"timestep_spacing": "trailing", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}


# ---- first order -------------------------------------------------------------------------------------------------

DDIM = [
    *({"prediction_type": kind, "clip_sample": clip} for kind in PREDICTIONS for clip in (True, False)),
    {"clip_sample": True, "clip_sample_range": 0.5},
    {"clip_sample": False, "thresholding": True, "sample_max_value": 1.5},
    {**SD, "set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False},
    {**COSINE, "set_alpha_to_one": False, "steps_offset": 1, "clip_sample": True},
    {**COSINE, "set_alpha_to_one": False, "clip_sample": False},
    {"timestep_spacing": "trailing", "prediction_type": "v_prediction"},
]


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("options", DDIM)
def test_ddim(options: dict[str, Any], steps: int, x: Tensor, tools: Any) -> None:
    """Not "linspace": there the in-tree class steps to times it does not visit next (see below)."""
    tools.agree(DDIMScheduler, "ddim", options, steps, x)


def test_euler_is_the_same_step(x: Tensor, tools: Any) -> None:
    tools.agree(DDIMScheduler, "euler", {"clip_sample": False}, 10, x)


def test_ddim_without_clipping_differs_from_clipped(x: Tensor, tools: Any) -> None:
    """The clipped cases above compare something: clipping changes the result by far more than the limit."""
    theirs, _ = tools.pair(DDIMScheduler, "ddim", {"clip_sample": True}, 10)
    _, ours = tools.pair(DDIMScheduler, "ddim", {"clip_sample": False}, 10)
    assert tools.difference(theirs, ours, x) > 100 * tools.limit


def test_ddim_with_zero_terminal_snr(x: Tensor, tools: Any) -> None:
    """alpha is 0 at the first step, exactly; nearly 0, as in the higher-order in-tree classes, is something else."""
    theirs, ours = tools.pair(DDIMScheduler, "ddim", ZERO_SNR, 10)
    assert tools.difference(theirs, ours, x) < tools.limit
    theirs.alphas_cumprod[-1] = 2**-24
    ours.set_timesteps(10)
    assert tools.limit < tools.difference(theirs, ours, x) < 2**-11


def test_ddim_on_the_times_that_linspace_steps_to(x: Tensor) -> None:
    """What the in-tree class does with "linspace" is the same step, to the time one even ratio lower."""
    theirs = DDIMScheduler(timestep_spacing="linspace", clip_sample=False)
    theirs.set_timesteps(7)
    t = theirs.timesteps[0]
    noise = NoiseSchedule.from_config(theirs.config)
    times = [noise.t_of_timestep(float(step)).item() for step in (t, t - 1000 // 7)]
    schedule = parse_recipe("ddim").schedule(noise, 1, at=tuple(times))
    ours = SolverScheduler.from_config(theirs.config, schedule=schedule.to_dict())
    ours.set_timesteps(1)
    output = torch.sin(x)
    expected = theirs.step(output, t, x).prev_sample
    torch.testing.assert_close(ours.step(output, t, x).prev_sample, expected, rtol=1e-5, atol=1e-6)


EULER = [
    *(
        {"timestep_spacing": spacing, "prediction_type": kind}
        for spacing in ("linspace", "trailing")
        for kind in ("epsilon", "v_prediction")
    ),
    {"timestep_spacing": "leading", "steps_offset": 1, **SD},
    {"final_sigmas_type": "sigma_min", "timestep_spacing": "trailing", **SD},
]


@pytest.mark.parametrize("recipe", ["euler", "ddim"])
@pytest.mark.parametrize("steps", [4, 10, 28])  # 999 / 27 is whole: the in-tree class does not round "linspace"
@pytest.mark.parametrize("options", EULER)
def test_euler(options: dict[str, Any], steps: int, recipe: str, x: Tensor, tools: Any) -> None:
    """The in-tree state is x / alpha."""
    tools.agree(EulerDiscreteScheduler, recipe, options, steps, x)


# ---- DPM-Solver++ ------------------------------------------------------------------------------------------------

MULTISTEP = [
    *(
        (f"dpmpp:order={order}", {"solver_order": order, "prediction_type": kind})
        for order in (1, 2, 3)
        for kind in PREDICTIONS
    ),
    *(
        ("dpmpp:solver_type=heun", {"solver_type": "heun", "timestep_spacing": spacing})
        for spacing in ("linspace", "leading", "trailing")
    ),
    *(
        (f"dpmpp:order={order}", {**SD, "solver_order": order, "final_sigmas_type": final})
        for order in (1, 2, 3)
        for final in ("zero", "sigma_min")
    ),
    *(
        (
            f"dpmpp:order={order},lower_order_final=false",
            {"solver_order": order, "lower_order_final": False, "final_sigmas_type": final},
        )
        for order in (2, 3)
        for final in ("zero", "sigma_min")
    ),
    ("dpmpp_2m", {"timestep_spacing": "leading", "steps_offset": 1}),
    ("dpmpp_2m", {"thresholding": True, "sample_max_value": 1.3}),
    ("dpmpp_2m", ZERO_SNR),
    ("dpmpp_3m", {**COSINE, "solver_order": 3, "lambda_min_clipped": -5.1}),
    ("dpmpp_3m", {"solver_order": 3, "num_train_timesteps": 50, "trained_betas": BETAS}),
]


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("recipe", "options"), MULTISTEP)
def test_dpmpp_multistep(recipe: str, options: dict[str, Any], steps: int, x: Tensor, tools: Any) -> None:
    tools.agree(DPMSolverMultistepScheduler, recipe, options, steps, x)


SINGLESTEP = [
    ("dpmpp:method=singlestep", {"lower_order_final": True}),
    ("dpmpp:method=singlestep,order=1", {"lower_order_final": True, "solver_order": 1}),
    (
        "dpmpp:method=singlestep,lower_order_final=false",
        {"lower_order_final": False, "final_sigmas_type": "sigma_min", "prediction_type": "v_prediction"},
    ),
    ("dpmpp_2s:solver_type=heun", {"lower_order_final": True, "solver_type": "heun", **SD}),
    ("dpmpp_2s", {"lower_order_final": True, "thresholding": True}),
]


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("recipe", "options"), SINGLESTEP)
def test_dpmpp_singlestep(recipe: str, options: dict[str, Any], steps: int, x: Tensor, tools: Any) -> None:
    tools.agree(DPMSolverSinglestepScheduler, recipe, options, steps, x)


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_dpmpp_singlestep_with_an_odd_number_of_steps(final: str, x: Tensor, tools: Any) -> None:
    options = {"lower_order_final": True, "final_sigmas_type": final}
    tools.agree(DPMSolverSinglestepScheduler, "dpmpp_2s", options, 5, x)


# ---- grids in sigma ----------------------------------------------------------------------------------------------

SIGMA_GRIDS = [
    (DPMSolverMultistepScheduler, "dpmpp_2m", {}),
    (DPMSolverSinglestepScheduler, "dpmpp_2s", {"lower_order_final": True}),
    (UniPCMultistepScheduler, "unipc", {}),
    (EulerDiscreteScheduler, "euler", {}),
]


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("kind", ["karras", "exponential"])
@pytest.mark.parametrize(("cls", "recipe", "options"), SIGMA_GRIDS)
def test_grids_in_sigma(
    cls: type[SchedulerMixin],
    recipe: str,
    options: dict[str, Any],
    kind: str,
    final: str,
    steps: int,
    x: Tensor,
    tools: Any,
) -> None:
    """The in-tree classes round the times of these sigmas to training steps, so the model must not look at them.

    With "sigma_min" they visit it twice; nothing happens in the step between.
    """
    options = {**SD, **options, f"use_{kind}_sigmas": True, "final_sigmas_type": final}
    tools.agree(cls, recipe, options, steps, x, timeless=True)


# ---- the caller's own times --------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [[999, 700, 400, 100], [850, 600, 300, 20, 3, 1]], ids=len)
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_given_timesteps(given: list[int], final: str, x: Tensor, tools: Any) -> None:
    theirs = DPMSolverMultistepScheduler(final_sigmas_type=final, **SD)
    ours = SolverScheduler.from_config(theirs.config, schedule="dpmpp:order=2")
    theirs.set_timesteps(timesteps=given)
    ours.set_timesteps(timesteps=given)
    assert ours.timesteps.tolist() == given
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=2e-6, atol=0)
    assert tools.difference(theirs, ours, x) < tools.limit


def test_given_timesteps_end_where_the_recipe_says() -> None:
    ours = SolverScheduler(schedule="deis:final=sigma_min")
    ours.set_timesteps(timesteps=[900, 300, 0])
    torch.testing.assert_close(ours.sigmas[-1], ours.sigmas[-2])
    assert ours.solver_schedule.times[-1] < ours.solver_schedule.times[-2]


@pytest.mark.parametrize("last", [[], [0.0]], ids=["N", "N+1"])
def test_given_sigmas(last: list[float], x: Tensor, tools: Any) -> None:
    """The times that belong to them are interpolated in another variable, so the model must not look at them."""
    given = [14.6, 6.3, 3.7, 1.4, 0.4]
    theirs = EulerDiscreteScheduler(**SD)
    ours = SolverScheduler.from_config(theirs.config, schedule="euler")
    theirs.set_timesteps(sigmas=[*given, 0.0])
    ours.set_timesteps(sigmas=[*given, *last])
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=2e-6, atol=0)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=0, atol=0.5)
    assert tools.difference(theirs, ours, x, timeless=True) < tools.limit

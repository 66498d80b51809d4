"""PNDM, ancestral midpoint rules, DDIM's arguments, zero terminal SNR, IPNDM's own schedule, inverted time: against diffusers.

Both sides draw equal noise: every draw of a run is the same tensor.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    IPNDMScheduler,
    KDPM2AncestralDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    SchedulerMixin,
    TCDScheduler,
)
from torch import Tensor

from samplers import NoiseSchedule, recipe, sample
from samplers.denoisers import GaussianMixture
from samplers.schedulers import SolverScheduler

ZERO_SNR = {
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "prediction_type": "v_prediction",
    "clip_sample": False,
}


@pytest.fixture
def one_noise(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The same draw everywhere, in diffusers and here."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
    from diffusers.schedulers import scheduling_k_dpm_2_ancestral_discrete as theirs

    from samplers.schedulers import noising as ours

    for module in (theirs, ours):
        monkeypatch.setattr(module, "randn_tensor", lambda shape, **kwargs: noise.to(kwargs.get("dtype")))
    return noise


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_pndm(n: int, x: Tensor, tools: Any) -> None:
    """``n`` of PNDM's steps are n + 1 evaluations. On other grids theirs goes T // n training steps whatever the grid is."""
    theirs = PNDMScheduler(skip_prk_steps=True, steps_offset=1, beta_schedule="scaled_linear", beta_end=0.012)
    ours = SolverScheduler.from_config(theirs.config, schedule="pndm")
    theirs.set_timesteps(n)
    ours.set_timesteps(n + 1)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    assert tools.difference(theirs, ours, x) < tools.limit


@pytest.mark.parametrize("eta_like", ["kdpm2:eta=1", "DPM2 a"])
@pytest.mark.parametrize("n", [3, 6])
def test_ancestral_midpoints(eta_like: str, n: int, x: Tensor, tools: Any, one_noise: Tensor) -> None:
    theirs = KDPM2AncestralDiscreteScheduler(timestep_spacing="trailing")
    ours = SolverScheduler.from_config(theirs.config, schedule=eta_like)
    theirs.set_timesteps(n)
    ours.set_timesteps(2 * n - 1)
    assert len(ours.timesteps) == len(theirs.timesteps)
    scale = (theirs.sigmas[0] ** 2 + 1) ** 0.5
    expected = tools.loop(theirs, x * scale, tools.timeless)
    assert tools.relative(tools.loop(ours, x, tools.timeless), expected) < tools.limit


@pytest.mark.parametrize("n", [1, 4, 9])
@pytest.mark.parametrize(
    ("cls", "text"),
    [
        (DDIMScheduler, "ddim"),
        (DDPMScheduler, "ddpm"),
        (CogVideoXDDIMScheduler, "ddim"),
        (LCMScheduler, "lcm"),
        (TCDScheduler, "tcd:eta=0"),
    ],
)
def test_zero_terminal_snr_of_first_order_classes(cls: type[SchedulerMixin], text: str, n: int, x: Tensor, tools: Any) -> None:
    """They take alpha = 0 at the first step exactly; the higher-order classes take 2^-12."""
    theirs = cls(**{key: value for key, value in ZERO_SNR.items() if cls is not TCDScheduler or key != "clip_sample"})
    ours = SolverScheduler.from_config(theirs.config, schedule=text)
    assert ours.noise_schedule.alpha(1.0) == 0
    theirs.set_timesteps(n)
    ours.set_timesteps(n)
    first = theirs.timesteps[0]
    assert ours.timesteps[0] == first
    out = tools.model(x, first)
    stochastic = cls in (DDPMScheduler, LCMScheduler)
    own = {"generator": torch.Generator().manual_seed(3)} if stochastic else {"eta": 0.0}
    expected = theirs.step(out, first, x, **own).prev_sample
    got = ours.step(out, first, x, generator=torch.Generator().manual_seed(3)).prev_sample
    assert tools.relative(got, expected) < 1e-6


def test_higher_orders_keep_a_finite_start_with_zero_terminal_snr(x: Tensor) -> None:
    config = DDIMScheduler(**ZERO_SNR).config
    for text in ("dpmpp:order=2", "unipc:order=3", "ddim"):
        scheduler = SolverScheduler.from_config(config, schedule=text)
        assert (scheduler.noise_schedule.alpha(1.0) == 0) == (text == "ddim")
        scheduler.set_timesteps(5)
        assert scheduler.tableau is not None
        for row in (row for stage in scheduler.tableau.stages for row in stage.rows):
            assert torch.tensor([c for _, c in row.terms]).isfinite().all()


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("clipped", [False, True])
def test_ddim_arguments_of_pipelines(eta: float, clipped: bool, x: Tensor, tools: Any) -> None:
    """``eta`` and ``use_clipped_model_output``, passed to every step as DDIM pipelines do."""
    theirs = DDIMScheduler(clip_sample=True, clip_sample_range=0.7)
    ours = SolverScheduler.from_config(theirs.config, schedule="ddim")

    def run(scheduler: SchedulerMixin) -> Tensor:
        scheduler.set_timesteps(6)
        state, draw = x, torch.Generator().manual_seed(5)
        for t in scheduler.timesteps:
            out = tools.model(state, t)
            options = {"eta": eta, "use_clipped_model_output": clipped, "generator": draw}
            state = scheduler.step(out, t, state, **options).prev_sample
        return state

    assert tools.relative(run(ours), run(theirs)) < tools.limit


def test_ddim_arguments_elsewhere_are_refused(x: Tensor) -> None:
    ours = SolverScheduler.from_config(DDIMScheduler().config, schedule="unipc:order=2")
    ours.set_timesteps(4)
    with pytest.raises(ValueError, match=r"eta=0.5 .* belong to DDIM, and the schedule is 'unipc:order=2'"):
        ours.step(x, ours.timesteps[0], x, eta=0.5)
    ddim = SolverScheduler.from_config(DDIMScheduler().config, schedule="ddim")
    ddim.set_timesteps(4)
    ddim.step(x, ddim.timesteps[0], x)
    with pytest.raises(ValueError, match="the same in every step"):
        ddim.step(x, ddim.timesteps[1], x, eta=0.5)
    ddim.set_timesteps(4)
    with pytest.raises(ValueError, match=r"eta must be in \[0, 1\], got 2"):
        ddim.step(x, ddim.timesteps[0], x, eta=2.0)


# ---- IPNDM's own schedule ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 6, 20])
def test_ipndm_in_its_own_schedule(n: int, x: Tensor, tools: Any) -> None:
    """In-tree, the first answer is multiplied by alpha = 0 and lost: n steps are our n - 1 with an analytic first step."""
    theirs = IPNDMScheduler()
    theirs.set_timesteps(n)
    ours = SolverScheduler.from_config(theirs.config, schedule="ipndm:afs=zero_x0")
    ours.set_timesteps(n - 1)
    assert ours.noise_schedule.kind == "vp_trig"
    torch.testing.assert_close(ours.timesteps, theirs.timesteps[1:], rtol=0, atol=1e-6)

    def model(state: Tensor, t: Tensor) -> Tensor:
        return tools.model(state, 1000 * t)

    first = tools.loop(theirs, x, model)
    assert tools.relative(tools.loop(ours, x, model), first) < tools.limit


def test_ipndm_config_without_the_analytic_step_uses_the_first_answer(x: Tensor) -> None:
    """From alpha = 0 a v-prediction network says x0 = -v; the step is DDIM's."""
    ours = SolverScheduler.from_config(IPNDMScheduler().config, schedule="ipndm")
    ours.set_timesteps(4)
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    assert ours.tableau is not None
    alpha, sigma = ours.noise_schedule.alpha_sigma(ours.solver_schedule.times[1])
    got = ours.step(v, ours.timesteps[0], x).prev_sample
    torch.testing.assert_close(got, (sigma * x - alpha * v).float(), rtol=1e-5, atol=1e-6)


def test_ipndm_with_trained_betas_is_refused() -> None:
    with pytest.raises(ValueError, match="noise levels of single steps"):
        NoiseSchedule.from_config({"_class_name": "IPNDMScheduler", "num_train_timesteps": 4, "trained_betas": [0.1] * 4})


# ---- inverted time (Mochi) -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("sigmas", [None, [1.0, 0.9, 0.5, 0.2]])
def test_inverted_sigmas(shift: float, sigmas: list[float] | None, x: Tensor, tools: Any) -> None:
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift, invert_sigmas=True)
    ours = SolverScheduler.from_config(theirs.config, schedule="euler")
    steps = {"sigmas": sigmas} if sigmas else {"num_inference_steps": 4}
    theirs.set_timesteps(**steps)
    ours.set_timesteps(**steps)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-6, atol=1e-6)
    assert tools.relative(tools.loop(ours, x), tools.loop(theirs, x)) < tools.limit
    again = SolverScheduler.from_config(ours.config)
    assert (again.config.invert_sigmas, again.model_config.prediction_type) == (True, "reversed_flow_prediction")
    assert FlowMatchEulerDiscreteScheduler.from_config(ours.config).config.invert_sigmas


def test_inverted_training_target(x: Tensor) -> None:
    ours = SolverScheduler.from_config(FlowMatchEulerDiscreteScheduler(invert_sigmas=True).config)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(ours.get_velocity(x, noise, torch.tensor([250.0, 250.0])), x - noise)
    torch.testing.assert_close(ours.add_noise(x, noise, torch.tensor([250.0, 250.0])), 0.25 * x + 0.75 * noise)


# ---- laws ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["dpmpp_sde", "DPM++ SDE", "DPM++ 2S a", "DPM2 a", "dpmpp_sde:eta=0.5"])
def test_noisy_midpoint_rules_reach_the_data(text: str, generator: Callable[..., torch.Generator]) -> None:
    """The law they end in is the data's, for as many steps as that takes."""
    noise = NoiseSchedule.vp_linear()
    data = GaussianMixture(torch.tensor([[-1.0], [1.5]], dtype=torch.float64), torch.tensor([0.2, 0.4], dtype=torch.float64))
    schedule = recipe(f"{text}{',' if ':' in text else ':'}grid=karras", noise, 319)
    assert schedule.stochastic
    start = torch.randn(20000, 1, dtype=torch.float64, generator=generator(1))
    got = sample(data.denoiser(noise), start, schedule, noise, generator=generator(2))
    exact = data.sample(20000, generator(3))
    for moment in (1, 2, 3):
        error = (got**moment).mean() - (exact**moment).mean()
        spread = ((got**moment).var() + (exact**moment).var()).sqrt() / 20000**0.5
        assert error.abs() < 4 * spread + 0.02


# ---- late entry --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["heun", "pndm", "kdpm2", "dpmpp_2s", "restart", "dpmpp_sde", "tcd", "unipc:order=3"])
@pytest.mark.parametrize("nfe", [5, 6])
def test_entry_anywhere_takes_the_steps_that_are_left(text: str, nfe: int, x: Tensor, tools: Any) -> None:
    """Also where a pipeline enters at the first of two looks at a time, which make one step."""
    for begin in range(nfe):
        scheduler = SolverScheduler.from_config(DDPMScheduler(clip_sample=False).config, schedule=text)
        scheduler.set_timesteps(nfe)
        scheduler.set_begin_index(begin)
        state = x
        for i, t in enumerate(scheduler.timesteps[begin:], start=1):
            state = scheduler.step(tools.timeless(state, t), t, state, return_dict=False)[0]
            assert scheduler.step_index == begin + i
        assert state.isfinite().all()
        with pytest.raises(RuntimeError, match="steps are done"):
            scheduler.step(state, scheduler.timesteps[-1], state)

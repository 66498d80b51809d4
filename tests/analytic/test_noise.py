"""Noise schedules against their definitions, and the exact inverse t_of_lam."""

import math

import pytest
import torch
from torch import Tensor

from samplers import NoiseSchedule

ALPHAS_CUMPROD = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
NOISE = {
    "vp_linear": NoiseSchedule.vp_linear(),
    "vp_linear_flat": NoiseSchedule.vp_linear(2.0, 2.0),
    "vp_cosine": NoiseSchedule.vp_cosine(),
    "vp_discrete": NoiseSchedule.vp_discrete(ALPHAS_CUMPROD),
    "edm": NoiseSchedule.edm(),
    "flow": NoiseSchedule.flow(),
    "flow_shifted": NoiseSchedule.flow(3.0),
}
ALL = pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)
VP = pytest.mark.parametrize("noise", [n for n in NOISE.values() if n.family == "vp"], ids=lambda n: n.kind)


def _inside(noise: NoiseSchedule, n: int = 301) -> Tensor:
    """Times in the open range, dense at both ends."""
    u = torch.linspace(1e-3, 1 - 1e-3, n, dtype=torch.float64)
    return noise.t_max * torch.cat([u**4, u, 1 - u**4]).unique()


@VP
def test_variance_is_preserved(noise: NoiseSchedule) -> None:
    alpha, sigma = noise.alpha_sigma(_inside(noise))
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha), rtol=1e-14, atol=0)


def test_vp_linear_is_the_integral_of_beta() -> None:
    noise = NoiseSchedule.vp_linear(0.1, 20.0)
    for t in (0.01, 0.37, 1.0):
        u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000 * t
        integral = (0.1 + 19.9 * u).mean() * t
        assert noise.alpha(t).item() == pytest.approx(math.exp(-0.5 * integral), rel=1e-12)


def test_vp_cosine_is_the_squared_cosine() -> None:
    def f(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2)

    for t in (0.1, 0.5, 0.9, 0.999):
        assert NOISE["vp_cosine"].alpha(t).item() == pytest.approx(f(t) / f(0), rel=1e-12)


def test_vp_discrete_interpolates_the_table() -> None:
    noise = NOISE["vp_discrete"]
    n = torch.arange(1000)
    torch.testing.assert_close(noise.alpha((n + 1) / 1000).square(), ALPHAS_CUMPROD, rtol=1e-5, atol=0)
    assert noise.alpha(1.0).item() ** 2 == pytest.approx(ALPHAS_CUMPROD[-1].item(), rel=1e-14)
    between = noise.alpha(0.5005).log()
    assert between.item() == pytest.approx(0.25 * (ALPHAS_CUMPROD[499].log() + ALPHAS_CUMPROD[500].log()).item())
    assert noise.alpha(0.0005).log().item() == pytest.approx(0.25 * ALPHAS_CUMPROD[0].log().item())


def test_edm_and_flow_are_what_they_say() -> None:
    t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    assert torch.equal(NOISE["edm"].alpha(t), torch.ones(3, dtype=torch.float64))
    assert torch.equal(NOISE["edm"].sigma(t), t)
    for name in ("flow", "flow_shifted"):
        assert torch.equal(NOISE[name].alpha(t), 1 - t)
        assert torch.equal(NOISE[name].sigma(t), t)


@ALL
def test_t_of_lam_inverts_lam(noise: NoiseSchedule) -> None:
    t = _inside(noise)
    torch.testing.assert_close(noise.t_of_lam(noise.lam(t)), t, rtol=1e-10, atol=1e-15 * noise.t_max)
    lam = torch.linspace(noise.lam(noise.t_max * 0.999).item(), 9.0, 50, dtype=torch.float64)
    torch.testing.assert_close(noise.lam(noise.t_of_lam(lam)), lam, rtol=0, atol=1e-10)


@ALL
def test_t_of_lam_at_the_ends(noise: NoiseSchedule) -> None:
    end = torch.tensor(math.inf, dtype=torch.float64)
    assert noise.t_of_lam(end).item() == pytest.approx(0.0, abs=1e-15)
    assert noise.t_of_lam(noise.lam(noise.t_max)).item() == pytest.approx(noise.t_max, rel=1e-14)
    assert noise.t_of_lam(-30.0).item() == pytest.approx(noise.t_max, rel=1e-9)


@ALL
def test_lambda_falls_strictly(noise: NoiseSchedule) -> None:
    assert bool((noise.lam(_inside(noise)).diff() < 0).all())


@ALL
def test_no_noise_at_time_zero(noise: NoiseSchedule) -> None:
    assert noise.alpha(0.0).item() == 1.0
    assert noise.sigma(0.0).item() == 0.0
    assert noise.lam(0.0).item() == math.inf


@pytest.mark.parametrize("name", ["vp_cosine", "flow"])
def test_no_signal_at_the_end_of_cosine_and_flow(name: str) -> None:
    noise = NOISE[name]
    assert noise.alpha(1.0).item() == 0.0
    assert noise.sigma(1.0).item() == pytest.approx(1.0, rel=1e-15)
    assert noise.lam(1.0).item() == -math.inf


def test_zero_terminal_snr_is_read_as_in_diffusers() -> None:
    table = torch.tensor([0.9, 0.4, 0.0], dtype=torch.float64)
    assert NoiseSchedule.vp_discrete(table).alpha(1.0).item() == pytest.approx(2.0**-12)
    assert table[-1] == 0


@ALL
@pytest.mark.parametrize("factor", [-0.01, 1.001, math.nan, math.inf])
def test_times_out_of_range_are_refused(noise: NoiseSchedule, factor: float) -> None:
    with pytest.raises(ValueError, match=f"time .* is outside .* of the {noise.kind} noise schedule"):
        noise.alpha(noise.t_max * factor)
    with pytest.raises(ValueError, match="outside"):
        noise.lam(torch.tensor([noise.t_max / 2, noise.t_max * factor]))


@ALL
def test_float32_rounding_is_clamped(noise: NoiseSchedule) -> None:
    above = torch.nextafter(torch.tensor(noise.t_max, dtype=torch.float32), torch.tensor(math.inf))
    assert above.double().item() > noise.t_max
    assert noise.sigma(above) == noise.sigma(noise.t_max)
    assert noise.sigma(-1e-9 * noise.t_min) == 0


@ALL
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_floats_and_tensors_give_float64(noise: NoiseSchedule, dtype: torch.dtype) -> None:
    for t in (0.5, torch.tensor(0.5, dtype=dtype), torch.tensor([[0.5], [0.25]], dtype=dtype)):
        for value in (noise.alpha(t), noise.sigma(t), noise.lam(t), noise.t_of_lam(noise.lam(t))):
            assert value.dtype == torch.float64
            assert value.shape == torch.as_tensor(t).shape
    assert noise.lam(torch.tensor(0.5, dtype=dtype)) == noise.lam(0.5)


@ALL
def test_gradients_match_finite_differences(noise: NoiseSchedule) -> None:
    t = (noise.t_max * torch.tensor([0.1003, 0.4007, 0.9001], dtype=torch.float64)).requires_grad_()
    for value in (noise.alpha, noise.sigma, noise.lam):
        assert torch.autograd.gradcheck(value, t, eps=1e-6 * noise.t_max, atol=1e-6)
    lam = noise.lam(t).detach().requires_grad_()
    assert torch.autograd.gradcheck(noise.t_of_lam, lam, eps=1e-6, atol=1e-6)


@ALL
def test_timestep_is_inverted(noise: NoiseSchedule) -> None:
    t = _inside(noise)
    torch.testing.assert_close(noise.t_of_timestep(noise.timestep(t)), t, rtol=1e-10, atol=1e-12)


def test_timestep_is_in_the_networks_units() -> None:
    assert NOISE["vp_discrete"].timestep(1.0).item() == 999
    assert NOISE["vp_discrete"].timestep(1 / 1000).item() == pytest.approx(0, abs=1e-12)
    assert NOISE["flow"].timestep(0.25).item() == 250
    assert NOISE["edm"].timestep(80.0).item() == pytest.approx(math.log(80.0) / 4)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: NoiseSchedule.vp_linear(0.0, 20.0), "0 < beta_min"),
        (lambda: NoiseSchedule.vp_linear(3.0, 2.0), "beta_min <= beta_max"),
        (lambda: NoiseSchedule.edm(0.0), "0 < sigma_min"),
        (lambda: NoiseSchedule.edm(2.0, 1.0), "sigma_min < sigma_max"),
        (lambda: NoiseSchedule.flow(0.0), "shift > 0"),
        (lambda: NoiseSchedule.vp_discrete(torch.ones(2, 2)), r"shape \(N,\)"),
        (lambda: NoiseSchedule.vp_discrete(torch.tensor([])), r"shape \(N,\)"),
        (lambda: NoiseSchedule.vp_discrete(torch.tensor([0.5, 0.7])), "decrease strictly"),
        (lambda: NoiseSchedule.vp_discrete(torch.tensor([1.2, 0.7])), "decrease strictly"),
        (lambda: NoiseSchedule.vp_discrete(torch.tensor([0.5, -0.1])), "decrease strictly"),
        (lambda: NoiseSchedule.vp_discrete(torch.tensor([0.5, math.nan])), "decrease strictly"),
    ],
)
def test_impossible_parameters_are_refused(build, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        build()

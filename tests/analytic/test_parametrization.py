"""The one conversion from a network's output to x0: exact round trips for every parametrization."""

import pytest
import torch
from torch import Tensor

from samplers import NoiseSchedule
from samplers.denoisers import from_epsilon, from_network
from samplers.parametrization import PARAMETRIZATIONS, to_x0, weighted_sum, x0_coefficients

LEVELS = {
    "vp": (0.6, 0.8),
    "vp end": (1.0, 0.0),
    "flow": (0.3, 0.7),
    "flow start": (0.0, 1.0),
    "edm": (1.0, 14.0),
}
SIGMA_DATA = 0.5


def _output(kind: str, x0: Tensor, eps: Tensor, alpha: float, sigma: float) -> Tensor:
    return {
        "epsilon": eps,
        "sample": x0,
        "v_prediction": alpha * eps - sigma * x0,
        "flow_prediction": eps - x0,
        "reversed_flow_prediction": x0 - eps,
    }[kind]


@pytest.fixture
def pair(generator) -> tuple[Tensor, Tensor]:
    g = generator(1)
    return torch.randn(3, 5, generator=g, dtype=torch.float64), torch.randn(3, 5, generator=g, dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "where"),
    [(kind, where) for kind in PARAMETRIZATIONS for where in LEVELS if (kind, where) != ("epsilon", "flow start")],
)
def test_x0_comes_back(kind: str, where: str, pair: tuple[Tensor, Tensor]) -> None:
    alpha, sigma = LEVELS[where]
    x0, eps = pair
    x = alpha * x0 + sigma * eps
    back = to_x0(_output(kind, x0, eps, alpha, sigma), x, alpha, sigma, kind)
    torch.testing.assert_close(back, x0, rtol=1e-12, atol=1e-12)


def test_epsilon_at_no_signal_is_refused() -> None:
    with pytest.raises(ValueError, match="alpha = 0"):
        x0_coefficients("epsilon", 0.0, 1.0)


def test_unknown_kinds_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'eps'; known: epsilon, sample, v_prediction, flow_prediction"):
        x0_coefficients("eps", 1.0, 1.0)
    with pytest.raises(ValueError, match="'velocity'; known"):
        from_network(torch.nn.Linear(2, 2), NoiseSchedule.flow(), "velocity")


@pytest.mark.parametrize(("kind", "sign"), [("epsilon", 1), ("sample", 1), ("v_prediction", -1)])
@pytest.mark.parametrize("sigma", [0.002, 1.0, 80.0])
def test_edm_preconditioning(kind: str, sign: int, sigma: float, pair: tuple[Tensor, Tensor]) -> None:
    """D = c_skip x + c_out F with the four coefficients of arXiv:2206.00364, table 1."""
    x, output = pair
    c_skip = SIGMA_DATA**2 / (sigma**2 + SIGMA_DATA**2)
    c_out = sigma * SIGMA_DATA / (sigma**2 + SIGMA_DATA**2) ** 0.5
    expected = c_skip * x + sign * c_out * output
    torch.testing.assert_close(to_x0(output, x, 1.0, sigma, kind, SIGMA_DATA), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("kind", PARAMETRIZATIONS)
def test_low_precision_outputs_do_not_lower_the_state(kind: str, pair: tuple[Tensor, Tensor]) -> None:
    x, output = pair[0].float(), pair[1].half()
    result = to_x0(output, x, 0.6, 0.8, kind)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, to_x0(output.float(), x, 0.6, 0.8, kind), rtol=0, atol=0)


@pytest.mark.parametrize("kind", PARAMETRIZATIONS)
def test_tensor_levels_stay_differentiable(kind: str, pair: tuple[Tensor, Tensor]) -> None:
    def f(t: Tensor) -> Tensor:
        alpha, sigma = NoiseSchedule.vp_linear().alpha_sigma(t)
        return to_x0(pair[1], pair[0], alpha, sigma, kind)

    t = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    if kind == "sample":
        assert not f(t).requires_grad
    else:
        assert torch.autograd.gradcheck(f, t)


def test_weighted_sum_keeps_dtype_and_broadcasts() -> None:
    x = torch.ones(2, 3)
    out = weighted_sum([(2.0, x), (torch.tensor(0.5, dtype=torch.float64), x), (-1.0, x)])
    assert out.dtype == torch.float32
    assert torch.equal(out, torch.full((2, 3), 1.5))
    per_pixel = torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(weighted_sum([(per_pixel, x), (1.0, x)]), torch.tensor([[2.0, 3.0, 4.0]] * 2))


class _Echo(torch.nn.Module):
    """Keeps what it was called with."""

    def __init__(self, dtype: torch.dtype, wrap: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(2.0, dtype=dtype))
        self.wrap = wrap

    def forward(self, x: Tensor, timestep: Tensor, **conditioning: Tensor) -> Tensor | tuple[Tensor]:
        self.seen = (x, timestep, conditioning)
        out = (x * self.weight).detach()
        return (out,) if self.wrap else out


@pytest.mark.parametrize("wrap", [False, True])
def test_network_gets_its_own_clock_and_dtype(wrap: bool) -> None:
    network, noise = _Echo(torch.bfloat16, wrap), NoiseSchedule.vp_linear()
    t = torch.tensor(0.5, dtype=torch.float64)
    x0 = from_network(network, noise, "sample", label=3)(torch.ones(2, 3), t)
    x, timestep, conditioning = network.seen
    assert x.dtype == torch.bfloat16
    assert timestep.item() == 499
    assert conditioning == {"label": 3}
    assert torch.equal(x0, torch.full((2, 3), 2.0))


def test_preconditioned_network_sees_scaled_input() -> None:
    network, noise = _Echo(torch.float64, False), NoiseSchedule.edm()
    x = torch.full((1, 2), 3.0, dtype=torch.float64)
    x0 = from_network(network, noise, sigma_data=SIGMA_DATA)(x, torch.tensor(2.0, dtype=torch.float64))
    c_in = (4.0 + 0.25) ** -0.5
    torch.testing.assert_close(network.seen[0], c_in * x)
    torch.testing.assert_close(x0, 0.25 / 4.25 * x + 1.0 / 4.25**0.5 * 2 * c_in * x)


def test_from_epsilon_is_the_epsilon_parametrization(pair: tuple[Tensor, Tensor]) -> None:
    noise, t = NoiseSchedule.vp_linear(), torch.tensor(0.3, dtype=torch.float64)
    x0, eps = pair
    x = noise.alpha(t) * x0 + noise.sigma(t) * eps
    torch.testing.assert_close(from_epsilon(lambda _x, _t: eps, noise)(x, t), x0, rtol=1e-12, atol=1e-12)

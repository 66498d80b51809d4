"""Networks as denoisers: the parametrization and the network's own clock are undone here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..engine import Denoiser
from ..noise import NoiseSchedule
from ..parametrization import EPSILON, check_parametrization, to_x0


def from_epsilon(eps_fn: Callable[[Tensor, Tensor], Tensor], noise_schedule: NoiseSchedule) -> Denoiser:
    r"""A denoiser from a noise prediction: $x_0 = (x - \sigma\epsilon(x, t)) / \alpha$.

    Args:
        eps_fn: ``eps_fn(x, t)`` with x (B, *E) and t a 0-d float64 tensor in the noise schedule's time.
        noise_schedule: gives alpha and sigma.
    """

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = _levels(noise_schedule, t)
        return to_x0(eps_fn(x, t), x, alpha, sigma, EPSILON)

    return denoiser


def from_network(
    network: torch.nn.Module,
    noise_schedule: NoiseSchedule,
    prediction_type: str = EPSILON,
    *,
    sigma_data: float | None = None,
    **conditioning: Any,
) -> Denoiser:
    """A denoiser from a diffusers-style network ``network(x, timestep, **conditioning)``.

    Args:
        network: returns a tensor, or an output whose first item is one, of x's shape.
        noise_schedule: the one it was trained with; supplies the timestep in the network's own units.
        prediction_type: "epsilon", "sample", "v_prediction" or "flow_prediction".
        sigma_data: EDM preconditioning with this data scale.
        conditioning: passed on with every call.

    Raises:
        ValueError: unknown ``prediction_type``.
    """
    check_parametrization(prediction_type)
    dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = _levels(noise_schedule, t)
        timestep = noise_schedule.timestep(t).to(device=x.device, dtype=torch.float32)
        model_input = x if sigma_data is None else x * (sigma**2 + sigma_data**2) ** -0.5
        output = network(model_input.to(dtype), timestep, **conditioning)
        output = output if torch.is_tensor(output) else output[0]
        return to_x0(output, x, alpha, sigma, prediction_type, sigma_data)

    return denoiser


def _levels(noise_schedule: NoiseSchedule, t: Tensor) -> tuple[float | Tensor, float | Tensor]:
    """alpha and sigma as floats, or as tensors while gradients with respect to t are wanted."""
    alpha, sigma = noise_schedule.alpha_sigma(t)
    return (alpha, sigma) if t.requires_grad else (alpha.item(), sigma.item())


def network_of(pipe: Any) -> torch.nn.Module:
    """The network that a pipeline evaluates every step: its ``unet`` or ``transformer``.

    Raises:
        ValueError: it has neither.
    """
    for name in ("unet", "transformer"):
        module = getattr(pipe, name, None)
        if isinstance(module, torch.nn.Module):
            return module
    raise ValueError(f"{type(pipe).__name__} has neither a unet nor a transformer")

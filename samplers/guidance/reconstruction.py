"""The gradient of self-guidance: how the model's own reconstruction changes with the state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..config_reader import read_config
from ..denoisers import network_of
from .hooks import NetworkCall
from .levels import time_of_alpha_bar

_SMALLEST = 1e-12


def reconstruction_gradient(
    pipe: Any,
    call: NetworkCall,
    level: float,
    draws: int,
    distance: str,
    first_half: bool,
    generator: torch.Generator | None,
) -> Tensor:
    """Gradient (R, C, ...) of the reconstruction distance in the state, largest absolute value 1 per image.

    The network's own output at the state stays in ``call.kept``, so the pipeline's evaluation is not repeated.

    Args:
        pipe: the pipeline.
        call: the evaluation.
        level: share of signal of the second noising.
        draws: noises.
        distance: "l2" or "l1".
        first_half: which half of a doubled batch is measured.
        generator: source of the noises.
    """
    noise_schedule = read_config(pipe.scheduler.config).noise_schedule()
    t = time_of_alpha_bar(noise_schedule, level)
    alpha, sigma = (value.item() for value in noise_schedule.alpha_sigma(t))
    images = len(call.state) // call.copies
    rows = slice(0, images) if call.copies == 1 or first_half else slice(images, 2 * images)
    network = network_of(pipe)
    frozen = [p for p in network.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            state = call.state.detach().clone().requires_grad_(True)
            x0 = call.answer(state)
            kept = call.kept
            total = 0.0
            for _ in range(draws):
                noise = _noise(x0[rows], generator)
                again = (alpha * x0[rows].detach() + sigma * noise).repeat(call.copies, *[1] * (x0.ndim - 1))
                with torch.no_grad():
                    target = call.answer(again, t)[rows]
                difference = (x0[rows] - target).flatten(1)
                norm = difference.norm(dim=1) if distance == "l2" else difference.abs().sum(1)
                total = total + norm.sum() / draws
            gradient = torch.autograd.grad(total, state)[0]
        call.kept = kept
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    gradient = gradient[rows].detach()
    largest = gradient.flatten(1).abs().amax(1).clamp(min=_SMALLEST)
    return (gradient / largest.reshape(-1, *[1] * (gradient.ndim - 1))).repeat(call.copies, *[1] * (gradient.ndim - 1))


def _noise(like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=device).to(like.device)

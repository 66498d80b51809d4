"""Scaled U-Net skips: what they compute, that they leave no trace, and the schedule beside them in a tiny Stable Diffusion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from samplers import SolverSchedule
from samplers.reference import load
from samplers.schedulers import scaled_skips, skip_count, swap


@pytest.fixture(scope="module")
def unet() -> UNet2DModel:
    return load("digits").unet


def run(unet: nn.Module, seed: int = 0) -> torch.Tensor:
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return unet(x, torch.tensor([500])).sample


def by_hand(unet: UNet2DModel, factors: list[float]) -> torch.Tensor:
    """The forward pass written out, with the skips scaled where they are stored."""
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        temb = unet.time_embedding(unet.time_proj(torch.tensor([500, 500])).to(x.dtype))
        h = unet.conv_in(x)
        stored = [h]
        for block in unet.down_blocks:
            h, outputs = block(h, temb)
            stored += outputs
        h = unet.mid_block(h, temb)
        assert len(stored) == len(factors)
        scaled = [s * f for s, f in zip(stored, factors, strict=True)]
        for block in unet.up_blocks:
            n = len(block.resnets)
            h = block(h, tuple(scaled[-n:]), temb)
            scaled = scaled[:-n]
        return unet.conv_out(unet.conv_act(unet.conv_norm_out(h)))


def test_scaling_is_the_forward_pass_with_scaled_skips(unet: UNet2DModel) -> None:
    n = skip_count(unet)
    factors = [0.9 + 0.02 * k for k in range(n)]
    with scaled_skips(unet, factors) as edit:
        scaled = run(unet)
    torch.testing.assert_close(scaled, by_hand(unet, factors), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(run(unet), by_hand(unet, [1.0] * n), rtol=1e-5, atol=1e-5)
    assert (scaled - run(unet)).abs().max() > 1e-3
    assert edit.calls == 1
    assert edit.label == f"network edited: skips scaled by 0.9 to {factors[-1]:g}"


def test_nothing_is_left_behind(unet: UNet2DModel) -> None:
    before, hooks = run(unet), sum(len(m._forward_pre_hooks) for m in unet.modules())
    with scaled_skips(unet, 0.9):
        assert not torch.equal(run(unet), before)
    assert torch.equal(run(unet), before)
    with pytest.raises(RuntimeError, match="on purpose"), scaled_skips(unet, 0.9):
        raise RuntimeError("on purpose")
    assert torch.equal(run(unet), before)
    assert sum(len(m._forward_pre_hooks) for m in unet.modules()) == hooks
    with scaled_skips(unet, 1.0) as edit:
        assert torch.equal(run(unet), before)
    assert (edit.identity, edit.label) == (True, "network unedited")


def test_rows_follow_the_calls(unet: UNet2DModel) -> None:
    n = skip_count(unet)
    with scaled_skips(unet, [[0.9] * n, [1.0] * n]) as edit:
        first, second, third = run(unet), run(unet), run(unet)
        edit.reset()
        again = run(unet)
    with scaled_skips(unet, 0.9):
        assert torch.equal(run(unet), first)
    assert torch.equal(second, run(unet))
    assert torch.equal(third, first)  # the next image starts at the first row
    assert torch.equal(again, first)


def test_what_does_not_fit_is_refused(unet: UNet2DModel) -> None:
    n = skip_count(unet)
    with pytest.raises(ValueError, match=f"has {n} skip connections"), scaled_skips(unet, [0.9] * (n - 1)):
        pass
    with pytest.raises(ValueError, match="needs a UNet2DModel"), scaled_skips(nn.Linear(1, 1), 0.9):
        pass


@pytest.mark.parametrize("afs", ["no_afs", "zero_x0"])
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_published_layout_with_skips_in_a_pipeline(name: str, afs: str, build: Callable[[str], Any]) -> None:
    """NFE is counted with and without the analytic first step and the edit; the pure result comes back afterwards."""
    tiny = build(name)
    count = skip_count(tiny.pipe)
    steps = 4
    none = {"type": "no_corrector"}
    derivative = {"active_points": [-2], "relaxation": "linear", "relaxation_coefficient": 0.05}
    published = {
        "timesteps": [1.0, 0.7, 0.4, 0.15, 0.001],
        "afs": afs,
        "orders": [1, 2, 2, 1],
        "start_points": [-1] * steps,
        "prediction_types": ["noise_prediction", "data_prediction", "noise_prediction", "data_prediction"],
        "derivative_types": [[], [derivative], [derivative], []],
        "corrector_types": [none] * steps,
        "skip_coefficients": [0.95] * count,
    }
    schedule = SolverSchedule.from_usf(published)
    factors = schedule.provenance["skip_coefficients"]
    nfe = steps - (afs != "no_afs")
    with swap(tiny.pipe, schedule):
        with tiny.counting() as batches:
            pure = tiny(nfe)
        with scaled_skips(tiny.pipe, factors) as edit:
            edited = tiny(nfe)
        assert torch.equal(tiny(nfe), pure)
    assert len(batches) == edit.calls == nfe == schedule.nfe
    assert not torch.equal(edited, pure)
    assert not edit.identity

"""Under the hooks that move weights: as far as a machine without an accelerator can run them, the result is the same."""

from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules
from diffusers.hooks import HookRegistry, apply_group_offloading
from tiny_pipelines.harness import Tiny
from torch import nn

from samplers.schedulers import SolverScheduler, swap

CPU = torch.device("cpu")
ANALYTIC = "dpmpp:order=2,grid=trailing,afs=zero_x0"


def _modules(tiny: Tiny) -> list[nn.Module]:
    return [part for part in tiny.pipe.components.values() if isinstance(part, nn.Module)]


def _sequential(tiny: Tiny) -> None:
    """What ``enable_sequential_cpu_offload`` does: weights are on the meta device but for the moment of their use."""
    for module in _modules(tiny):
        accelerate.cpu_offload(module, CPU)


def _model(tiny: Tiny) -> None:
    tiny.pipe.enable_model_cpu_offload(device="cpu")


def _group(tiny: Tiny) -> None:
    for denoiser in tiny.denoisers:
        apply_group_offloading(denoiser, onload_device=CPU, offload_device=CPU, offload_type="leaf_level")


def _remove(tiny: Tiny) -> None:
    tiny.pipe.remove_all_hooks()
    for module in _modules(tiny):
        remove_hook_from_submodules(module)
        for part in module.modules():
            registry = getattr(part, "_diffusers_hook", None)
            if isinstance(registry, HookRegistry):
                for name in list(registry.hooks):
                    registry.remove_hook(name, recurse=False)


offloads = pytest.mark.parametrize("offload", [_sequential, _model, _group])


@offloads
@pytest.mark.parametrize("name", ["sd", "flux", "ltx_i2v", "wan22"])
def test_a_swap_under_offload(name: str, offload: Callable[[Tiny], None], build: Callable[..., Tiny]) -> None:
    """The hook of an analytic first step runs before the weights' hooks, and leaves none behind."""
    tiny = build(name)
    with swap(tiny.pipe, ANALYTIC):
        expected = tiny(3)
    offload(tiny)
    with swap(tiny.pipe, ANALYTIC), tiny.counting() as batches:
        assert torch.equal(tiny(3), expected)
    assert batches == [tiny.rows] * (3 * tiny.calls)
    assert not any(denoiser._forward_pre_hooks for denoiser in tiny.denoisers)
    with swap(tiny.pipe, ANALYTIC):
        assert torch.equal(tiny(3), expected)  # a second swap, on modules that are hooked already


@offloads
def test_offload_that_comes_and_goes_inside_a_swap(offload: Callable[[Tiny], None], build: Callable[..., Tiny]) -> None:
    tiny = build("sd3")
    before = tiny(3)
    with swap(tiny.pipe, ANALYTIC):
        expected = tiny(3)
        offload(tiny)
        assert torch.equal(tiny(3), expected)
        _remove(tiny)
        if offload is not _sequential:  # whose weights stay with the hooks
            assert torch.equal(tiny(3), expected)
    if offload is not _sequential:
        assert torch.equal(tiny(3), before)


@offloads
def test_a_stochastic_schedule_under_offload(offload: Callable[[Tiny], None], build: Callable[..., Tiny]) -> None:
    """The generator is the caller's, wherever the weights are."""
    tiny = build("sd")
    tiny.pipe.scheduler = SolverScheduler.from_config(tiny.pipe.scheduler.config, schedule="euler_ancestral")

    def draw(**extra: Any) -> torch.Tensor:
        return tiny(3, generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)], **extra)

    expected = draw()
    offload(tiny)
    assert torch.equal(draw(), expected)

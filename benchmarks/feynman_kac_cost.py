"""What the corrector itself costs per step, for `feynman_kac.py`: time, memory and tensor operations, next to a U-Net's."""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from samplers.particles import FeynmanKac, Target, Trace
from samplers.particles.hooks.branches import Catcher
from samplers.particles.hooks.plans import plan_of
from samplers.particles.hooks.run import Call, Steps

Row = dict[str, float]
REPEATS, STEPS = 3, 30


class Watch(TorchDispatchMode):
    """Counts tensor operations and the bytes of the tensors they have made that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.alive = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        taken = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        for leaf in tree_leaves(out):
            if torch.is_tensor(leaf) and (place := leaf.untyped_storage().data_ptr()) not in taken | self.seen and place:
                size = leaf.untyped_storage().nbytes()
                self.seen.add(place)
                self.alive += size
                self.peak = max(self.peak, self.alive)
                weakref.finalize(leaf, self._release, place, size)
        return out

    def _release(self, place: int, size: int) -> None:
        self.alive -= size
        self.seen.discard(place)


def cost() -> Iterator[tuple[str, Callable[[], Row]]]:
    """K = 4 at 64 x 64 latents; guidance, so the network sees a batch of 8."""

    def run() -> Row:
        k = 4
        torch.manual_seed(0)
        # A quarter of Stable Diffusion's width: a sixteenth of its work, so the shares measured here are upper bounds.
        unet = UNet2DConditionModel(
            sample_size=64, block_out_channels=(80, 160, 320, 320), cross_attention_dim=192, norm_num_groups=20
        )
        latents, text = torch.randn(2 * k, 4, 64, 64), torch.randn(2 * k, 77, 192)
        latents[k:] = latents[:k]

        def network() -> Tensor:
            with torch.no_grad():
                return unet(latents, 500, text).sample

        times: dict[str, list[float]] = {"network": [], "scheduler": [], "corrected": []}
        for _ in range(REPEATS):
            output, spent = timed(network)
            times["network"].append(spent)
            for name in ("scheduler", "corrected"):
                steps = stepper(unet, output, k, corrected=name == "corrected")
                times[name].append(statistics.median(timed(step)[1] for step in steps))
        with Watch() as forward:
            network()
        traces: list[Trace] = []
        watched = [watch(step) for step in stepper(unet, output, k, corrected=True, kept=traces)]
        plain = [watch(step) for step in stepper(unet, output, k, corrected=False)]
        extra = [a - b for a, b in zip(times["corrected"], times["scheduler"], strict=True)]
        return {
            "network_s": statistics.median(times["network"]),
            "corrector_s": statistics.median(extra),
            "share": statistics.median(a / b for a, b in zip(extra, times["network"], strict=True)),
            "peak_bytes": statistics.median(w.peak for w in watched) - statistics.median(w.peak for w in plain),
            "network_peak_bytes": forward.peak,
            "latent_bytes": latents[:k].nbytes,
            "operations": statistics.median(w.operations for w in watched) - statistics.median(w.operations for w in plain),
            "network_operations": forward.operations,
            "kept_bytes": sum(value.nbytes for values in vars(traces[0]).values() for value in values) / STEPS,
        }

    yield "cost/sd-quarter/4/0", run


def timed(step: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    result = step()
    return result, time.process_time() - start


def watch(step: Callable[[], Any]) -> Watch:
    with Watch() as found:
        step()
    return found


def stepper(
    unet: Any, output: Tensor, k: int, *, corrected: bool, kept: list[Trace] | None = None
) -> Iterator[Callable[[], Any]]:
    """The scheduler's step, alone or inside the corrector, as often as a run has steps; resampled at every one.

    The run's trace goes to ``kept``.
    """
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(STEPS + 1)
    catcher, x = Catcher(unet), torch.randn(k, 4, 64, 64)
    settings, call = FeynmanKac(Target.cfg(2.0), ess=1.0), Call(k, 2.0, torch.Generator().manual_seed(0), "all", lambda v: v)
    steps = Steps(settings, call, catcher, scheduler, plan_of(scheduler, exact=True, resamples=True, eta=1.0))
    mixed = output[:k] + 2.0 * (output[k:] - output[:k])
    for t in scheduler.timesteps[:STEPS]:
        catcher.outputs = [output]
        if corrected:
            yield lambda t=t: steps.step(scheduler.step, mixed, t, x, 1.0, return_dict=False)
        else:
            yield lambda t=t: scheduler.step(mixed, t, x, 1.0, return_dict=False)
    if kept is not None and steps.population is not None:
        kept.append(steps.population.trace)

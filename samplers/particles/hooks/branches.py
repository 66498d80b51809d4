"""The outputs of the guidance branches, as the network gave them: caught by hooks, told apart, checked against the mix."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

CONDITIONAL_FIRST = ("DiTPipeline",)  # order of the halves in one doubled batch; elsewhere the unconditional half is first
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def networks(pipe: Any) -> list[torch.nn.Module]:
    """The denoisers of a pipeline; some have two for different noise levels.

    Raises:
        ValueError: it has none.
    """
    found = [getattr(pipe, name, None) for name in ("unet", "transformer", "transformer_2")]
    found = [module for module in found if isinstance(module, torch.nn.Module)]
    if not found:
        raise ValueError(f"{type(pipe).__name__} has neither a unet nor a transformer")
    return found


class Catcher:
    """Keeps what the network, or a modular pipeline's guider, produced since the last step."""

    def __init__(self, pipe: Any) -> None:
        """Nothing is caught before `install`."""
        self.name = type(pipe).__name__
        self.outputs: list[Tensor] = []
        self.guided: tuple[Tensor, Tensor] | None = None

    def install(self, pipe: Any, stack: ExitStack) -> None:
        """Hook the networks, and the guider if there is one; ``stack`` undoes it."""
        for module in networks(pipe):
            stack.callback(module.register_forward_hook(self._after).remove)
        guider = getattr(pipe, "guider", None)
        if guider is not None:
            stack.callback(restore(guider, "forward"))
            guider.forward = self._guiding(guider.forward)

    def _after(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.outputs.append((output if torch.is_tensor(output) else output[0]).detach())

    def _guiding(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def guide(pred_cond: Tensor, pred_uncond: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
            if pred_uncond is not None:
                self.guided = (pred_uncond.detach(), pred_cond.detach())
            return forward(pred_cond, pred_uncond, *args, **kwargs)

        return guide

    def clear(self) -> None:
        """Forget, at the end of a step."""
        self.outputs, self.guided = [], None

    def branches(self, model_output: Tensor) -> tuple[Tensor, Tensor]:
        """The unconditional and the conditional output, each (B, *E).

        Raises:
            ValueError: the step's network calls are not two branches of classifier-free guidance.
        """
        if self.guided is not None:
            return self.guided
        channels = model_output.shape[1]
        outputs = [o[:, :channels] if o.shape[1] == 2 * channels else o for o in self.outputs]  # learned variances
        if len(outputs) == 1 and len(outputs[0]) % 2 == 0 and len(model_output) in (len(outputs[0]), len(outputs[0]) // 2):
            first, second = outputs[0].chunk(2)
            halves = (second, first) if self.name in CONDITIONAL_FIRST else (first, second)
            if len(model_output) == len(first) or self.name in CONDITIONAL_FIRST:
                return halves
        elif len(outputs) == 2 and outputs[0].shape == outputs[1].shape == model_output.shape:
            return outputs[1], outputs[0]  # pipelines that call twice do the conditional branch first
        raise ValueError(
            f"{self.name} made {len(outputs)} network call(s) of batch {[len(o) for o in outputs]} for {len(model_output)} "
            "latents, which is not an unconditional and a conditional branch: give it a guidance scale above 1, and a negative "
            "prompt where it wants one (true classifier-free guidance)"
        )


def mismatch(model_output: Tensor, mixed: Tensor) -> Tensor:
    """Largest relative difference (0-d) between what the scheduler was given and the mix of the branches."""
    given = model_output[: len(mixed)].float()
    return (given - mixed.float()).abs().amax() / mixed.float().abs().amax().clamp(min=1e-12)


def restore(thing: Any, name: str) -> Callable[[], None]:
    """A function that puts an instance attribute back as it is now, or removes it if it is only the class's."""
    if name in vars(thing):
        old = vars(thing)[name]
        return lambda: setattr(thing, name, old)
    return lambda: delattr(thing, name) if name in vars(thing) else None

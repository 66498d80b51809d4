"""A pipeline with random weights, and ways to call it, to count its network calls and to look into them."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

BATCH = 2
LATENT = {"output_type": "latent"}
NO_TEXT = {"tokenizer": None, "text_encoder": None}
HEADS = {"num_layers": 1, "num_attention_heads": 2}


@dataclass
class Tiny:
    """A pipeline with what is needed to call, count, compare, save and reload it."""

    pipe: DiffusionPipeline
    inputs: dict[str, Any]  # of a call, besides the number of steps and the generator
    rows: int = 2 * BATCH  # of one network call for `BATCH` images: guidance doubles them
    calls: int = 1  # network calls per step: Wan makes one for each side of guidance
    absent: tuple[str, ...] = ()  # components that must be passed to ``from_pretrained`` as None
    first_order: list[tuple[str, type, dict[str, Any]]] = field(default_factory=list)  # ours, in-tree, its options
    sigmas: list[float] | None = None  # of 8 steps, passed to ours where the in-tree class places them differently
    whole_steps: bool = False  # the in-tree class cuts flow timesteps to integers: show the network such in both
    lost_answers: int = 0  # of the in-tree class, which multiplies them by zero
    answer_to_noise: float = 1.0  # of a network that takes its input for pure noise, over that noise

    def __post_init__(self) -> None:
        self.pipe.set_progress_bar_config(disable=True)
        for denoiser in self.denoisers:
            denoiser.eval()  # DiT drops labels at random in training

    @property
    def denoisers(self) -> list[nn.Module]:
        """Wan 2.2 has two."""
        found = [getattr(self.pipe, name, None) for name in ("unet", "transformer", "transformer_2")]
        return [denoiser for denoiser in found if denoiser is not None]

    @property
    def denoiser(self) -> nn.Module:
        return self.denoisers[0]

    def __call__(self, steps: int | None, seed: int = 7, **extra: Any) -> Tensor:
        """Latents, or images where the pipeline has no other output; (B, *E) float."""
        inputs = {"generator": torch.Generator().manual_seed(seed), **self.inputs, **extra}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "In CPU autocast", UserWarning)  # Mochi asks for float32 there
            out = self.pipe(num_inference_steps=steps, return_dict=False, **inputs)[0]
        return torch.as_tensor(out)

    def to(self, dtype: torch.dtype) -> None:
        """Weights and inputs in another dtype."""
        self.pipe.to(dtype)
        self.inputs = {
            key: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
            for key, value in self.inputs.items()
        }

    @contextmanager
    def hooked(self, after: Callable[..., Any]) -> Iterator[None]:
        """``after(module, args, kwargs, output)`` follows every network call inside."""
        with ExitStack() as stack:
            for denoiser in self.denoisers:
                stack.callback(denoiser.register_forward_hook(after, with_kwargs=True).remove)
            yield

    @contextmanager
    def seeing(self) -> Iterator[list[tuple[nn.Module, Tensor, Tensor]]]:
        """Module, state and timestep of every network call inside, as the network itself gets them."""
        seen: list[tuple[nn.Module, Tensor, Tensor]] = []

        def after(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
            seen.append((module, _given(args, kwargs).clone(), torch.as_tensor(timestep).clone()))

        with self.hooked(after):
            yield seen

    @contextmanager
    def counting(self) -> Iterator[list[int]]:
        """The batch of every network call made inside."""
        batches: list[int] = []
        with self.hooked(lambda module, args, kwargs, output: batches.append(len(_answer(output)))):
            yield batches

    @contextmanager
    def failing_at(self, call: int) -> Iterator[None]:
        """The network raises at that call, counted from 0."""
        made: list[int] = []

        def after(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            made.append(len(made))
            if made[-1] == call:
                raise RuntimeError("on purpose")

        with self.hooked(after):
            yield

    @contextmanager
    def first_answer_is_the_input(self) -> Iterator[None]:
        """The first step's network calls return their input: a state of pure noise, in words of eps or of velocity."""
        pending = [True] * self.calls

        def after(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
            if not pending:
                return None
            pending.pop()
            given, answer = _given(args, kwargs), _answer(output)
            channels = answer.shape[1]
            noise = torch.cat([given] * -(-channels // given.shape[1]), dim=1)  # learned variances: any
            noise = self.answer_to_noise * noise[:, :channels]  # conditions come after the state
            return (noise,) if isinstance(output, tuple) else type(output)(sample=noise)

        with self.hooked(after):
            yield

    @contextmanager
    def cutting_timesteps(self) -> Iterator[None]:
        """The network inside sees whole training steps below 1000."""

        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
            return args, {**kwargs, "timestep": kwargs["timestep"].float().floor().clamp(max=999.0)}

        with ExitStack() as stack:
            for denoiser in self.denoisers:
                stack.callback(denoiser.register_forward_pre_hook(before, with_kwargs=True).remove)
            yield


def _given(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states" if "hidden_states" in kwargs else "sample"]


def _answer(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output.sample


def embeddings(*, pooled: bool = False, guided: bool = True, masks: bool = False) -> dict[str, Tensor]:
    """Random text embeddings for `BATCH` prompts, with what different pipelines want beside them."""
    out = {"prompt_embeds": torch.randn(BATCH, 5, 16)}
    if pooled:
        out["pooled_prompt_embeds"] = torch.randn(BATCH, 16)
    if guided:
        out |= {f"negative_{name}": torch.randn_like(value) for name, value in out.items()}
    if masks:
        ones = torch.ones(BATCH, 5, dtype=torch.long)
        out |= {"prompt_attention_mask": ones, "negative_prompt_attention_mask": ones}
    return out


def relative(a: Tensor, b: Tensor) -> float:
    """Norm of the difference over the norm of ``b``."""
    return ((a.float() - b.float()).norm() / b.float().norm()).item()

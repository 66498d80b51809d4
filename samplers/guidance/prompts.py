"""Rare images of a prompt: one appended token whose embedding is optimised while the image is made."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..denoisers import network_of
from ..parametrization import to_x0
from .hooks import GuidanceRun, NetworkCall, guided_network
from .levels import time_of_alpha_bar
from .shifts import Window


@dataclass(frozen=True)
class PromptSettings:
    """How the token is optimised.

    Attributes:
        init_word: whose embedding it starts from; one token of the tokenizer.
        steps: Adam updates K at every optimised evaluation.
        lr: of Adam.
        level: share of signal alpha_bar of the second noising.
        window: optimised where low <= alpha_bar <= high; the published one is the noisiest tenth of the steps.
        every: at every n-th evaluation.
    """

    init_word: str = "cool"
    steps: int = 10
    lr: float = 1e-2
    level: float = 0.05
    window: tuple[float, float] = (1e-3, 0.016)
    every: int = 1

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        if self.steps < 1 or not self.lr > 0 or not 0 < self.level < 1:
            raise ValueError(f"steps and lr must be positive and level in (0, 1), got {self.steps}, {self.lr}, {self.level}")
        Window(*self.window, self.every)


@contextmanager
def minority_prompt(
    pipe: Any,
    prompt: str | Sequence[str],
    settings: PromptSettings | None = None,
    *,
    generator: torch.Generator | None = None,
) -> Iterator[GuidanceRun]:
    r"""Rare images of ``prompt`` with Stable Diffusion (Um & Ye 2025, arXiv:2410.07838): no classifier, no data.

        with minority_prompt(pipe, "a dog in a field"):
            images = pipe("a dog in a field").images

    A token is appended to the prompt. At noisy evaluations its embedding v climbs $|a - b|$, where a is the prediction with the
    token, noised again to ``level`` and predicted without the token as b. Every image has its own v, kept from step to step,
    and the conditional half of guidance is evaluated with it. The pipeline's text encoder and tokenizer are left as they are.
    Expect small effects that depend on the prompt, and leave the safety checker on.

    Args:
        pipe: a Stable Diffusion 1.x or 2.x pipeline (``tokenizer``, one CLIP ``text_encoder``, ``unet``).
        prompt: the prompt or prompts that the pipeline is called with.
        settings: see `PromptSettings`.
        generator: source of the second noise.

    Yields:
        Counts: ``guided`` evaluations had the token optimised, each of them with ``2 * steps`` extra ones of the network.

    Raises:
        ValueError: a pipeline of another kind, an ``init_word`` of several tokens, or a prompt without room for one more.
    """
    settings, run = settings or PromptSettings(), GuidanceRun()
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    text = _Text(pipe, prompts, settings.init_word)
    inside, values = Window(*settings.window, settings.every), {}

    def shift(call: NetworkCall) -> Tensor | None:
        given = call.inputs.named.get("encoder_hidden_states")
        if given is None:
            raise ValueError("the network was not given encoder_hidden_states by name: this pipeline is of another kind")
        images = len(call.state) // call.copies
        if images % len(prompts):
            raise ValueError(f"{len(prompts)} prompts do not fit a batch of {images} images")
        if call.first:
            values["v"] = text.initial.float().repeat(images, 1)
        if inside(call.alpha, call.sigma, call.index):
            values["v"] = _optimised(pipe, text, values["v"], call, settings, generator)
            run.guided += 1
        with torch.no_grad():
            conditional = text.encode(values["v"]).to(given.dtype)
        states = torch.cat([given[: len(given) - images], conditional])  # the conditional half comes last
        call.kept = call.inputs.call(call.network, encoder_hidden_states=states)
        return None

    with guided_network(pipe, shift, run):
        yield run


class _Text:
    """The prompts' tokens with one more before the end, and their encoding with that token's embedding replaced."""

    def __init__(self, pipe: Any, prompts: list[str], init_word: str) -> None:
        name = type(pipe).__name__
        tokenizer, self.encoder = getattr(pipe, "tokenizer", None), getattr(pipe, "text_encoder", None)
        single = getattr(pipe, "text_encoder_2", None) is None and getattr(pipe, "unet", None) is not None
        if tokenizer is None or not isinstance(self.encoder, torch.nn.Module) or not single:
            raise ValueError(f"minority_prompt needs a Stable Diffusion pipeline with one text encoder and a unet, not {name}")
        word = tokenizer(init_word, add_special_tokens=False).input_ids
        if len(word) != 1:
            raise ValueError(f"init_word {init_word!r} is {len(word)} tokens of this tokenizer; choose a word that is one")
        length = min(tokenizer.model_max_length, self.encoder.config.max_position_embeddings)
        padded = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
        self.plain_ids = tokenizer(prompts, **padded).input_ids
        self.ids, self.places = self.plain_ids.clone(), []
        for row, tokens in enumerate(tokenizer(prompts).input_ids):
            if len(tokens) + 1 > length:
                raise ValueError(f"prompt {row} has {len(tokens)} tokens of {length}: there is no room for one more")
            end = len(tokens) - 1  # of the end-of-text token, which moves one place on
            self.ids[row, end], self.ids[row, end + 1] = word[0], tokens[-1]
            self.places.append(end)
        self.table = self.encoder.get_input_embeddings()
        self.initial = self.table.weight[word[0]].detach().clone()[None]
        mask = tokenizer(prompts, **padded).attention_mask
        self.mask = mask if getattr(self.encoder.config, "use_attention_mask", False) else None

    def _rows(self, tensor: Tensor, images: int) -> Tensor:
        return tensor.repeat_interleave(images // len(tensor), dim=0).to(self.table.weight.device)

    def encode(self, v: Tensor | None, images: int | None = None) -> Tensor:
        """(images, length, width) embeddings of the prompts, with the token v (images, width) or without one."""
        images = len(v) if v is not None else images
        mask = None if self.mask is None else self._rows(self.mask, images)
        if v is None:
            return self.encoder(self._rows(self.plain_ids, images), attention_mask=mask)[0]
        places = self._rows(torch.tensor(self.places), images)
        at = torch.nn.functional.one_hot(places, self.ids.shape[1]).bool()[:, :, None]

        def replace(module: torch.nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            return torch.where(at, v.to(output.dtype)[:, None], output)

        handle = self.table.register_forward_hook(replace)
        try:
            return self.encoder(self._rows(self.ids, images), attention_mask=mask)[0]
        finally:
            handle.remove()


@contextmanager
def _frozen(*modules: torch.nn.Module) -> Iterator[None]:
    """No gradients for the modules' weights inside the block."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def _optimised(
    pipe: Any, text: _Text, v: Tensor, call: NetworkCall, settings: PromptSettings, generator: torch.Generator | None
) -> Tensor:
    """The token embeddings (images, width) after K Adam steps up the reconstruction distance."""
    images = len(v)
    t = time_of_alpha_bar(call.clock.noise, settings.level)
    alpha, sigma = call.clock.levels_at(t)
    network = functools.partial(_rows_of, call, images)
    with _frozen(network_of(pipe), text.encoder), torch.inference_mode(False), torch.enable_grad():
        state = call.state[-images:].detach().clone()
        plain = text.encode(None, images).detach()
        v = v.detach().clone().requires_grad_(True)
        optimiser = torch.optim.Adam([v], lr=settings.lr)
        for _ in range(settings.steps):
            a = network(state, None, text.encode(v))
            where = state.device if generator is None else generator.device
            noise = torch.randn(a.shape, generator=generator, dtype=a.dtype, device=where).to(a.device)
            b = network(alpha * a + sigma * noise, t, plain)
            loss = -(a - b).flatten(1).norm(dim=1).sum()
            (v.grad,) = torch.autograd.grad(loss, v)
            optimiser.step()
            call.run.extra_evaluations += 2
    return v.detach()


def _rows_of(call: NetworkCall, images: int, state: Tensor, t: Tensor | None, text: Tensor) -> Tensor:
    """The x0-prediction for the conditional rows alone."""
    clock, inputs = call.clock, call.inputs
    alpha, sigma = (call.alpha, call.sigma) if t is None else clock.levels_at(t)
    told = inputs.timestep if t is None else clock.told(t, inputs.timestep)
    if torch.is_tensor(told) and told.ndim:
        told = told[-images:]
    scaled = (state * clock.input_scale(sigma)).to(inputs.state.dtype)
    output = call.network(scaled, told, encoder_hidden_states=text.to(inputs.state.dtype), return_dict=False)[0]
    return to_x0(output.to(state.dtype), state, alpha, sigma, clock.model.prediction_type, clock.model.sigma_data)

"""`DiscreteSolverScheduler`: discrete samplers, plain and learned, in diffusers' token pipelines.

It speaks the interfaces of the in-tree token schedulers (aMUSEd, block refinement, discrete DDIM, entropy bound): `timesteps`
counts up from 0, one entry per network evaluation, and `step` takes logits. All sampling is `samplers.discrete.DiscreteRun`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor

from ..discrete import DiscreteRun, DiscreteTable, MaskedProcess, Process, UniformProcess, resample_table

DEFAULTS = {"masked": "fixed_count", "uniform": "tweedie"}
FALLBACKS = ("refuse", "interpolate")


@dataclass
class DiscreteSolverSchedulerOutput(BaseOutput):
    """What a step returns; ids are in the model's numbering.

    Attributes:
        prev_sample: ids after the step, in the shape of the step's ``sample``.
        transfer_index: sites whose mask became a token, bool.
        editing_transfer_index: sites whose token changed (or was masked again), bool.
        sampled_tokens: the ids after the step; where a site stays masked, the most probable token.
        sampled_probs: the model's probabilities of ``sampled_tokens``.
        pred_logits: the logits after the step's exponent, for self-conditioning.
        pred_original_sample: the most probable clean ids.
    """

    prev_sample: Tensor
    transfer_index: Tensor
    editing_transfer_index: Tensor
    sampled_tokens: Tensor
    sampled_probs: Tensor
    pred_logits: Tensor
    pred_original_sample: Tensor


class DiscreteSolverScheduler(SchedulerMixin, ConfigMixin):
    """Discrete sampler for token pipelines.

    Args:
        process: "masked", "uniform", or "auto": masked where a mask id is known (here or in `step`), else uniform.
        mask_token_id: id of the mask.
        transition: text of a plain sampler, or "auto": "fixed_count" for masked, "tweedie" for uniform noise.
        grid: time grid of a plain sampler.
        tables: learned samplers, ``{str(nfe): DiscreteTable.to_dict()}``; they override ``transition``.
        fallback: what to do for an NFE without a table: "refuse" or "interpolate" the nearest.
        num_inference_steps: steps before `set_timesteps` is called.
        block_length: kept for pipelines that read it.

    Raises:
        ValueError: unknown names, or tables that are not sound.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        process: str = "auto",
        mask_token_id: int | None = None,
        transition: str = "auto",
        grid: str = "uniform",
        tables: dict[str, Any] | None = None,
        fallback: str = "refuse",
        num_inference_steps: int = 32,
        block_length: int = 32,
    ) -> None:
        """Check the settings; `set_timesteps` builds the sampler."""
        if process not in ("auto", "masked", "uniform"):
            raise ValueError(f"process must be auto, masked or uniform, got {process!r}")
        if fallback not in FALLBACKS:
            raise ValueError(f"fallback must be one of {', '.join(FALLBACKS)}, got {fallback!r}")
        if process == "uniform" and mask_token_id is not None:
            raise ValueError(f"uniform noise has no mask; mask_token_id is {mask_token_id}: set one of them")
        for nfe, data in (tables or {}).items():
            table = DiscreteTable.from_dict(data)
            if str(table.nfe) != str(nfe):
                raise ValueError(f"the table under {nfe!r} makes {table.nfe} network evaluations")
            if process not in ("auto", table.process):
                raise ValueError(f"the table under {nfe!r} is for {table.process} noise, process is {process}")
        self.init_noise_sigma = 1.0
        self._warned = False
        self._tables = {int(nfe): DiscreteTable.from_dict(data) for nfe, data in (tables or {}).items()}
        self._start(num_inference_steps, None)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As in diffusers. Corrector sweeps of the source are switched off: pipelines would ask for them by its settings.

        Warns:
            UserWarning: the source made corrector sweeps.
        """
        if isinstance(config, Mapping) and config.get("corrector_steps"):
            warnings.warn(
                f"the corrector sweeps of the former scheduler (corrector_steps={config['corrector_steps']}) are switched off: "
                "every network evaluation is a step here",
                stacklevel=2,
            )
            config = {**config, "corrector_steps": 0}
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    def _start(self, nfe: int, device: torch.device | str | None) -> None:
        self.num_inference_steps = nfe
        self.timesteps = torch.arange(nfe, device=device)
        self._run: DiscreteRun | None = None
        self._plans: dict[str, DiscreteTable] = {}

    def set_timesteps(
        self,
        num_inference_steps: int,
        temperature: Any = None,
        device: str | torch.device | None = None,
        block_length: int | None = None,
    ) -> None:
        """Choose the number of network evaluations.

        Args:
            num_inference_steps: the NFE.
            temperature: taken for aMUSEd's call, which passes its own; the table's exponents are used.
            device: of `timesteps`.
            block_length: taken for block pipelines; samplers here adapt to any length.

        Raises:
            ValueError: no table for this NFE and ``fallback`` is "refuse", or fewer than one step.
        """
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
        if isinstance(temperature, str | torch.device) and device is None:  # (n, device) by position, as the newer pipelines
            device = temperature
        if self._tables and num_inference_steps not in self._tables and self.config.fallback == "refuse":
            known = ", ".join(str(n) for n in sorted(self._tables))
            raise ValueError(
                f"there is a learned table for {known} network evaluations, num_inference_steps is {num_inference_steps}; "
                "use one of these, or fallback='interpolate'"
            )
        self._start(num_inference_steps, device)

    def plan(self, process: str) -> DiscreteTable:
        """The table in use for a kind of noise."""
        if process not in self._plans:
            self._plans[process] = self._plan(process)
        return self._plans[process]

    def _plan(self, process: str) -> DiscreteTable:
        nfe = self.num_inference_steps
        if self._tables:
            if nfe in self._tables:
                table = self._tables[nfe]
            else:
                table = resample_table(self._tables[min(self._tables, key=lambda known: abs(known - nfe))], nfe)
            if table.process != process:
                raise ValueError(f"the learned table is for {table.process} noise, the pipeline uses {process} noise")
            return table
        text = self.config.transition
        return DiscreteTable.plain(process, DEFAULTS[process] if text == "auto" else text, nfe, self.config.grid)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample as it is."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        *,
        mask_token_id: int | None = None,
        prompt_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
        **ignored: Any,
    ) -> DiscreteSolverSchedulerOutput | tuple[Tensor, ...]:
        """One network evaluation's worth of sampling.

        Args:
            model_output: logits (B, L, K), or (B, K, H, W) for ids (B, H, W).
            timestep: an entry of `timesteps`. Index 0 begins a new run, so blocks may restart; another index after no step
                joins late, as image-to-image does.
            sample: ids (B, L) or (B, H, W).
            mask_token_id: overrides the config's.
            prompt_mask: sites (L,) or (B, L) that must not change; given tokens under masked noise never do.
            generator: source of randomness.
            return_dict: an output object, or its values as a tuple.
            ignored: samplers' settings of other schedulers (temperature, top_p, threshold, ...); the table has its own.

        Raises:
            ValueError: shapes that do not fit or a timestep out of range.
        """
        picture = sample.ndim == 3
        if picture:
            model_output = model_output.flatten(2).transpose(1, 2)
        ids = sample.flatten(1)
        if model_output.ndim != 3 or model_output.shape[:2] != ids.shape:
            wanted = f"logits for ids of shape {tuple(sample.shape)}"
            raise ValueError(f"model_output of shape {tuple(model_output.shape)} does not hold {wanted}")
        self._complain(ignored)
        mask_id = self.config.mask_token_id if mask_token_id is None else mask_token_id
        masked = self.config.process == "masked" or (self.config.process == "auto" and mask_id is not None)
        if masked and mask_id is None:
            raise ValueError("masked noise needs mask_token_id: set it in the config or pass it to step")
        process = (MaskedProcess if masked else UniformProcess)(model_output.shape[-1])
        x = torch.where(ids == mask_id, process.vocab, ids) if masked else ids
        run = self._running(int(timestep), process, x, prompt_mask)
        run.generator = generator
        exponent = run.step.temp
        logits = model_output.to(torch.promote_types(model_output.dtype, torch.float32))
        if masked and mask_id < process.vocab:  # the mask is one of the model's symbols, and never a sample
            logits = logits.index_fill(-1, torch.tensor([mask_id], device=logits.device), -torch.inf)
        probs = logits.softmax(-1)
        run.tell(probs if exponent == 1.0 else (exponent * logits).softmax(-1), x, tempered=True)
        return self._output(model_output * exponent, probs, x, run.x, process, mask_id, sample, picture, return_dict)

    def _running(self, index: int, process: Process, x: Tensor, prompt_mask: Tensor | None) -> DiscreteRun:
        """The run that is due for its query ``index``."""
        if not 0 <= index < self.num_inference_steps:
            raise ValueError(f"timestep must be one of 0 .. {self.num_inference_steps - 1}, got {index}")
        run = self._run
        fits = run is not None and run.process == process and run.x.shape == x.shape
        if index == 0 or not fits or run.position != index:
            frozen = None if prompt_mask is None else prompt_mask.to(x.device).expand(x.shape)
            run = DiscreteRun(self.plan(process.name), process, x, frozen=frozen)
            run.join(index)
            self._run = run
        return run

    def _output(
        self,
        logits: Tensor,
        probs: Tensor,
        before: Tensor,
        after: Tensor,
        process: Process,
        mask_id: int | None,
        sample: Tensor,
        picture: bool,
        return_dict: bool,
    ) -> DiscreteSolverSchedulerOutput | tuple[Tensor, ...]:
        best = probs.argmax(-1)
        hidden = after == process.vocab  # never true under uniform noise
        tokens = torch.where(hidden, best, after)
        given = torch.where(before == process.vocab, best, before) if process.name == "masked" else best
        changed, was_hidden = after != before, before == process.vocab
        ids = torch.where(hidden, mask_id, after) if mask_id is not None and process.name == "masked" else after
        values = (
            ids.view_as(sample),
            (changed & was_hidden).view_as(sample),
            (changed & ~was_hidden).view_as(sample),
            tokens.view_as(sample),
            probs.gather(-1, tokens[..., None])[..., 0].view_as(sample),
            logits.transpose(1, 2).unflatten(2, sample.shape[1:]) if picture else logits,
            given.view_as(sample),
        )
        return DiscreteSolverSchedulerOutput(*values) if return_dict else values

    def _complain(self, ignored: dict[str, Any]) -> None:
        """Warn once about a caller's sampling settings that have no effect here."""
        names = ("temperature", "top_p", "top_k")
        given = {name: ignored[name] for name in names if ignored.get(name)}
        if given and not self._warned:
            self._warned = True
            warnings.warn(f"DiscreteSolverScheduler does not use {given}: its table or transition decides", stacklevel=3)

    def add_noise(self, sample: Tensor, timesteps: Tensor | int, generator: torch.Generator | None = None) -> Tensor:
        """Ids with as many masks as are left after the step ``timesteps`` (aMUSEd's image-to-image).

        Raises:
            ValueError: no mask id in the config, or a timestep out of range.
        """
        if self.config.mask_token_id is None:
            raise ValueError("add_noise needs mask_token_id in the config")
        index = int(timesteps)
        if not 0 <= index < self.num_inference_steps:
            raise ValueError(f"timestep must be one of 0 .. {self.num_inference_steps - 1}, got {index}")
        left = self.plan("masked").masked_share(index)
        place = sample.device if generator is None else generator.device
        hit = torch.rand(sample.shape, generator=generator, device=place).to(sample.device) < left
        return torch.where(hit, self.config.mask_token_id, sample)

    @staticmethod
    def check_eos_finished(
        cur_x: Tensor,
        sampled_tokens: Tensor,
        final_transfer: Tensor,
        finished: Tensor,
        eos_token_id: int,
        mask_token_id: int,
        prompt_length: int,
    ) -> Tensor:
        """Rows (B,) that committed an end token with no mask between the prompt and the first end token."""
        committed = ((sampled_tokens == eos_token_id) & final_transfer).any(-1)
        place = torch.arange(cur_x.shape[1], device=cur_x.device)
        first = torch.where(cur_x == eos_token_id, place, cur_x.shape[1]).amin(-1)
        open_before = ((cur_x == mask_token_id) & (place >= prompt_length) & (place < first[:, None])).any(-1)
        return finished | (committed & ~open_before & (first >= prompt_length) & (first < cur_x.shape[1]))

    def check_block_should_continue(
        self,
        step_idx: int,
        masks_remaining: bool | Tensor,
        editing_enabled: bool,
        editing_transfer_index: Tensor,
        post_steps: int,
        max_post_steps: int,
        finished: Tensor,
    ) -> bool:
        """Whether a block has network evaluations left to make: runs have a fixed length, and no post-editing."""
        return step_idx < self.num_inference_steps and bool(masks_remaining) and not bool(finished.all())

    def __len__(self) -> int:
        """Number of network evaluations."""
        return self.num_inference_steps

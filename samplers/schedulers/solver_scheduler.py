"""`SolverScheduler`: any solver schedule inside an unmodified diffusers pipeline."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from torch import Tensor

from ..config_reader import TRIG, ModelConfig, alphas_cumprod_of, betas_of, read_config
from ..engine import Engine
from ..parametrization import EPSILON, to_x0
from ..recipes import RecipeText, parse_recipe
from ..strategy import SolverSchedule
from ..tableau import Tableau
from .clipping import clip_from_config
from .noising import Noising, noise_like, wide
from .opening import check_opened
from .output import SolverSchedulerOutput
from .sources import load_tensors, resolve_schedule, split_config
from .times import place_of, published_levels, schedule_for, with_ddim_arguments

DEFAULT_SCHEDULE = "dpmpp:order=2"


class SolverScheduler(Noising, SchedulerMixin, ConfigMixin):
    """A diffusers scheduler that runs a solver schedule: recipe text, or a fixed schedule found by search.

    ``num_inference_steps`` is the number of network evaluations, each an entry of ``timesteps``; ``order`` is always 1. The
    state keeps the model's own scaling: variance preserving, EDM (variance exploding) or flow.

        pipe.scheduler = SolverScheduler.from_config(pipe.scheduler.config, schedule="unipc:order=3")
        pipe(prompt, num_inference_steps=8)
    """

    _compatibles: ClassVar[list[str]] = [e.name for e in KarrasDiffusionSchedulers]
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        schedule: str | dict[str, Any] = DEFAULT_SCHEDULE,
        family: str = "vp",
        prediction_type: str = "epsilon",
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        snr_shift_scale: float | None = None,
        final_sigmas_type: str | None = None,
        set_alpha_to_one: bool | None = None,
        lambda_min_clipped: float = -math.inf,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        variance_type: str | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_lu_lambdas: bool = False,
        original_inference_steps: int = 50,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        sigma_data: float | None = None,
        sigma_schedule: str = "karras",
        clock: str = "log",
        rho: float = 7.0,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        time_shift_type: str = "exponential",
        shift_terminal: float | None = None,
        invert_sigmas: bool = False,
        statistics: str | None = None,
        first_x0: str | None = None,
        noise_seed: int | None = None,
    ) -> None:
        """Build from explicit values; `from_config` reads them from another scheduler's config.

        The names and meanings are those of diffusers' own schedulers, of which each family reads its own. Where the recipe
        names a grid, the keys that choose times do nothing.

        Keys:
            num_train_timesteps: training steps N.
            beta_start, beta_end, beta_schedule, trained_betas: the noise schedule (vp).
            rescale_betas_zero_snr, snr_shift_scale: its rescaling (vp; the second is CogVideoX's).
            schedule: recipe text ("unipc:order=3,grid=karras"), the path or the name of a solver schedule's JSON, or its dict.
            family: "vp", "edm" or "flow".
            prediction_type: "epsilon", "sample", "v_prediction" or "flow_prediction".
            timestep_spacing, steps_offset, lambda_min_clipped: times among the training steps (vp).
            final_sigmas_type, set_alpha_to_one: where the last step ends (the second is DDIM's spelling).
            use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas, use_lu_lambdas, rho: named grids.
            original_inference_steps: steps that the checkpoint was distilled on (lcm, tcd).
            clip_sample, clip_sample_range: clamp x0, for recipes whose in-tree class does.
            thresholding, dynamic_thresholding_ratio, sample_max_value: likewise dynamic thresholding.
            variance_type: "learned" and "learned_range" models return twice the channels; the second half is dropped.
            sigma_min, sigma_max, sigma_data, sigma_schedule, clock: noise levels and preconditioning (edm).
            shift, shift_terminal: static time shift (flow).
            invert_sigmas: the network is told 1 - sigma and predicts x0 - eps (flow: Mochi).
            use_dynamic_shifting, time_shift_type: the pipeline passes ``mu`` (flow).
            base_shift, max_shift, base_image_seq_len, max_image_seq_len: read by pipelines that compute ``mu``.
            statistics: path of `EmpiricalStatistics`, for the steps that use them; saved pipelines keep the path.
            first_x0: path of a safetensors file with the data's mean, for an "average_x0" first step.
            noise_seed: of stochastic schedules, where the pipeline passes no generator: image b's noise at step i depends on
                (noise_seed, i, b) alone. None draws from torch's global generator.

        Raises:
            ValueError: unknown values, a malformed schedule or recipe.
            FileNotFoundError: a schedule or file that is not there.
        """
        schedule = resolve_schedule(schedule)
        if not isinstance(schedule, str):
            schedule = json.loads(json.dumps(SolverSchedule.from_dict(schedule).to_dict()))  # lists, as when read back
        self.register_to_config(schedule=schedule)
        if implied := self.config.get("_use_default_values"):
            # What names the model always travels with the config; diffusers drops the rest on the way to another class.
            self.register_to_config(_use_default_values=sorted(set(implied) - {"family", "prediction_type"}))
        self.model_config: ModelConfig = read_config(self.config)
        self.source = parse_recipe(schedule) if isinstance(schedule, str) else SolverSchedule.from_dict(schedule)
        honours = self.source.recipe.honours if isinstance(self.source, RecipeText) else ()
        # Classes that clip x0 (DDIM, DDPM, LCM, TCD) take zero terminal signal-to-noise exactly in-tree, the others nearly.
        exact_end = "clip_sample" in honours and self.model_config.prediction_type != EPSILON
        self.noise_schedule = self.model_config.noise_schedule(exact_end=exact_end)
        self._tensors = load_tensors(first_x0, statistics)
        self.betas, self.alphas_cumprod = None, None
        if self.model_config.family == "vp" and beta_schedule != TRIG:
            self.betas, self.alphas_cumprod = betas_of(self.config), alphas_cumprod_of(self.config)
        elif trained_betas is not None:
            self.betas = torch.as_tensor(trained_betas, dtype=torch.float32)
        # Sampling state: everything below is rebuilt by set_timesteps.
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1, dtype=torch.float32)
        self.sigmas = torch.zeros(0)
        self.solver_schedule: SolverSchedule | None = None
        self.tableau: Tableau | None = None
        self._reset()

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | None = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read the config of any supported diffusers scheduler; keyword arguments override its values.

        The raw config decides the family first: diffusers itself would drop values that were defaults of the old class and
        put this class's defaults in their place.

        Raises:
            ValueError: the config's model is of no supported kind, or a value is unknown; also an analytic first step where
                the pipeline cannot apply it (flow models: use `samplers.schedulers.swap`).
        """
        model, mine, foreign = split_config(config, cls._get_init_keys(cls))
        hooked = kwargs.pop("_hooked", False)
        made = super().from_config(mine, return_unused_kwargs=return_unused_kwargs, **kwargs)
        scheduler = made[0] if return_unused_kwargs else made
        scheduler.register_to_config(**foreign)  # kept for the way back to the class they belong to
        if model.family == "flow" and scheduler.analytic_first_step and not hooked:
            raise ValueError(
                "flow pipelines do not call scale_model_input, so an analytic first step needs "
                "`with samplers.schedulers.swap(pipe, schedule): ...` instead of from_config"
            )
        return made

    # ---- facts -------------------------------------------------------------------------------------------------

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the starting noise, in the state's scaling."""
        return math.hypot(self.noise_schedule.t_max, 1.0) if self.model_config.family == "edm" else 1.0

    @property
    def step_index(self) -> int | None:
        """Network evaluations done, or None before the first."""
        return None if self._engine is None else self._begun_at + self._engine.position

    @property
    def opened(self) -> bool:
        """Whether `scale_model_input` has applied the analytic first step of the run that is about to begin."""
        return self._opening is not None

    @property
    def begin_index(self) -> int | None:
        """Where `set_begin_index` put the start, or None."""
        return self._begin_index

    @property
    def analytic_first_step(self) -> bool:
        """Whether the first step of the schedule needs no network."""
        return self.source.analytic_first_step

    def __len__(self) -> int:
        """Number of training timesteps."""
        return int(self.config.num_train_timesteps)

    # ---- before the loop ---------------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Choose the times and compile the schedule.

        Args:
            num_inference_steps: network evaluations. May be None when ``timesteps`` or ``sigmas`` are given.
            device: where ``timesteps`` go.
            timesteps: the caller's own times, in the model's units; replace a grid that the schedule leaves open.
            sigmas: likewise as noise levels, N or N + 1 of them (sigma / alpha for vp, sigma for edm and flow, before shift).
            mu: dynamic shift of flow models.

        Raises:
            ValueError: a number of evaluations that a fixed schedule does not have, both or neither of the above, or times
                that do not fit the model.
        """
        schedule = schedule_for(
            self.source,
            self.config,
            self.noise_schedule,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            sigmas=sigmas,
            mu=mu,
        )
        self.solver_schedule = schedule
        self.tableau = Tableau.build(schedule, self.noise_schedule, **self._tensors)
        queries = [stage.query for stage in self.tableau.stages]
        t = torch.stack([query.t for query in queries])
        self.timesteps = self.noise_schedule.timestep(t).to(torch.float32).to(device)
        end = torch.tensor(schedule.times[-1], dtype=torch.float64)
        levels = published_levels(self.noise_schedule, torch.cat([t, end[None]]), reversed_flow=self.config.invert_sigmas)
        self.sigmas = levels.to(torch.float32)
        self.num_inference_steps = len(queries)
        self._reset()

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at this entry of ``timesteps`` (img2img); also saves the look-up by value, hence a device sync."""
        self._begin_index = begin_index

    def index_for_timestep(self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """Index of a timestep; the second where it occurs twice, the last where it does not occur."""
        return place_of(timestep, self.timesteps if schedule_timesteps is None else schedule_timesteps)

    # ---- in the loop ---------------------------------------------------------------------------------------------

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The network's input: EDM preconditioning, and the analytic first step where the schedule has one."""
        if self.tableau is None:
            return sample
        if self._engine is None and self.analytic_first_step and self._first_index(timestep) == 0:
            noise, sample = sample, self.open(sample)
            self._opening = (noise, sample)
        if self.model_config.sigma_data is None:
            return sample
        if self._engine is not None and self._engine.query is not None:
            sigma = self._engine.levels[1]
        else:
            sigma = self.tableau.stages[-1 if self._engine is not None else self._first_index(timestep)].query.sigma
        return sample * (sigma**2 + self.model_config.sigma_data**2) ** -0.5

    def open(self, sample: Tensor) -> Tensor:
        """Apply the steps before the first network evaluation to the starting noise (B, *E)."""
        assert self.tableau is not None
        if self.tableau.first_x0 is not None and self.tableau.first_x0.shape != sample.shape[1:]:
            mean, state = tuple(self.tableau.first_x0.shape), tuple(sample.shape[1:])
            raise ValueError(f"first_x0 has shape {mean}, the state {state}")
        return Engine(self.tableau, wide(sample)).x.to(sample.dtype)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
    ) -> SolverSchedulerOutput | tuple[Tensor, Tensor]:
        """Take the network's output at ``timestep`` and return the next state to evaluate it at.

        Args:
            model_output: (B, *E), or (B, 2C, ...) for learned-variance models.
            timestep: used to find the start when `set_begin_index` was not called.
            sample: (B, *E), the state the output belongs to; edits made since the last step are honoured.
            generator: noise source of stochastic schedules.
            return_dict: a `SolverSchedulerOutput`, or a tuple of the same.
            eta: DDIM's share of ancestral noise, where the recipe is ddim; the same in every step.
            use_clipped_model_output: DDIM's: noise predictions follow a clipped x0; likewise.

        Raises:
            RuntimeError: before `set_timesteps`, or after the last step.
            ValueError: shapes that do not fit; the last two with another recipe, or not the same in every step.
        """
        if self.tableau is None:
            raise RuntimeError("call set_timesteps before step")
        if (asked := (eta, bool(use_clipped_model_output))) != self._ddim_arguments:
            self._take_ddim_arguments(*asked)
        if self._engine is None:
            if self._opening is not None and sample is self._opening[1]:
                sample = self._opening[0]  # DiT goes on from the scaled input itself: open it once, not twice
            self._start(timestep, sample)
            self._opening = None
        engine = self._engine
        assert engine is not None
        if engine.query is None:
            raise RuntimeError(f"all {len(self.timesteps)} steps are done; call set_timesteps to start again")
        if self.config.variance_type in ("learned", "learned_range") and model_output.shape[1] == 2 * sample.shape[1]:
            model_output = model_output.chunk(2, dim=1)[0]
        if model_output.shape != sample.shape:
            raise ValueError(f"model_output has shape {tuple(model_output.shape)}, sample {tuple(sample.shape)}")
        first = self.analytic_first_step and self.step_index == 0
        state = engine.x if first else wide(sample)
        model = self.model_config
        x0 = to_x0(wide(model_output), state, *engine.levels, model.prediction_type, model.sigma_data)
        if self._idle:
            self._idle, self._begun_at, prev_sample = self._idle - 1, self._begun_at + 1, sample
        else:
            engine.tell(x0, state, partial(self._draw, generator=generator))
            prev_sample = engine.x.to(model_output.dtype)
        if not return_dict:
            return prev_sample, x0
        return SolverSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x0)

    def select(self, index: Tensor) -> None:
        """Between two steps, permute or duplicate samples: all that is remembered follows ``index`` (B',) along the batch.

        The caller gives the next `step` a sample that followed it too. Before the first step nothing is remembered.
        """
        if self._engine is not None:
            self._engine.select(index)

    def _draw(self, x: Tensor, generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
        return noise_like(x, generator, seed=self.config.noise_seed, step=self.step_index or 0)

    def _take_ddim_arguments(self, eta: float, use_clipped_model_output: bool) -> None:
        """Compile the run's schedule anew, with what DDIM pipelines pass to every `step`."""
        if not (isinstance(self.source, RecipeText) and self.source.recipe.name == "ddim"):
            raise ValueError(
                f"eta={eta} and use_clipped_model_output={use_clipped_model_output} belong to DDIM, and the schedule is "
                f"{self.config.schedule!r}: leave them out, or use 'ddim'"
            )
        if self._engine is not None:
            raise ValueError("eta and use_clipped_model_output must be the same in every step")
        assert self.solver_schedule is not None
        self.solver_schedule = with_ddim_arguments(self.solver_schedule, eta, use_clipped_model_output)
        self.tableau = Tableau.build(self.solver_schedule, self.noise_schedule, **self._tensors)
        self._ddim_arguments = (eta, use_clipped_model_output)

    def _first_index(self, timestep: float | Tensor | None) -> int:
        if self._begin_index is not None:
            return self._begin_index
        return 0 if timestep is None else self.index_for_timestep(timestep)

    def _start(self, timestep: float | Tensor, sample: Tensor) -> None:
        """Open a run at the timestep's place; steps whose history lies before it become first order."""
        assert self.tableau is not None
        assert self.solver_schedule is not None
        index = self._first_index(timestep)
        if not 0 <= index < len(self.tableau.stages):
            raise ValueError(f"begin index {index} is outside the {len(self.tableau.stages)} steps of the schedule")
        tableau = self.tableau
        if index > 0:
            tail = self.solver_schedule.tail(self.tableau.stages[index].query.node)
            tableau = Tableau.build(tail, self.noise_schedule, statistics=self._tensors["statistics"])
        elif self.analytic_first_step and not self.opened:
            check_opened(self.opened_sizes, sample)
        clip = None
        if tableau.clip == "config":
            clip = clip_from_config(self.config, self.source.recipe.honours if isinstance(self.source, RecipeText) else ())
        self._engine = Engine(tableau, wide(sample), clip)
        self._begun_at = index
        # Begun where a step is looked at a second time, that step lies in the past: its evaluation is made and not used.
        self._idle = len(self.tableau.stages) - index - len(tableau.stages)

    def _reset(self) -> None:
        self._engine: Engine | None = None
        self._begun_at = self._idle = 0
        self._begin_index: int | None = None
        self._ddim_arguments: tuple[float, bool] = (0.0, False)
        self._opening: tuple[Tensor, Tensor] | None = None  # the noise, and what scale_model_input made of it
        self.opened_sizes: frozenset[int] = frozenset()  # values per sample that a hook opened in the network's input

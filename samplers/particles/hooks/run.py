"""One corrected call of a pipeline: what happens at each of its scheduler's steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ...parametrization import to_x0, x0_coefficients
from ..cloud import Population, Trace
from ..path import disagreement, first_weight, log_density_change, log_interval
from ..potentials import Steering
from ..resampling import Generators
from ..settings import Settings
from .branches import CONDITIONAL_FIRST, TOLERANCE, Catcher, mismatch
from .plans import Plan, permute

Decode = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Call:
    """What one pipeline call was set up with.

    Attributes:
        particles: K.
        scale: the guidance scale the pipeline mixes with, or None where branches are not at stake.
        generator: source of resampling's draws.
        pick: which particles go on to be decoded.
        decode: from x0-predictions to what the reward sees.
    """

    particles: int
    scale: float | None
    generator: Generators
    pick: str
    decode: Decode


class Steps:
    """Observes, reweights and resamples before each scheduler step of one pipeline call."""

    def __init__(self, settings: Settings, call: Call, catcher: Catcher, scheduler: Any, plan: Plan) -> None:
        """Start at the first of the plan's evaluations."""
        self.settings, self.call, self.catcher, self.scheduler, self.plan = settings, call, catcher, scheduler, plan
        self.position = 0
        self.population: Population | None = None
        self.steering: Steering | None = None
        self.kept: Tensor | None = None  # rows that were decoded
        self.beyond: list[Tensor] = []  # share of x0 values that the scheduler's clipping moved, per step
        self._mismatch: Tensor | None = None
        self._log_ratio: Tensor | None = None  # log q(x|c) - log q(x), for exponents that vary
        self._previous: tuple[Tensor, list[Tensor]] | None = None

    @property
    def branching(self) -> bool:
        """Whether the target is a mix of guidance branches."""
        return self.settings.target.branches != ("model",)

    def step(
        self, original: Callable[..., Any], model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kw: Any
    ) -> Any:
        """Stand in for ``scheduler.step``: same arguments after ``original``, the scheduler's own."""
        plan, steps = self.plan, len(self.plan.levels) - 1
        if self.position >= steps:
            raise RuntimeError(f"all {steps} steps of this run are done; call the pipeline again")
        population = self._begin(sample, timestep) if self.population is None else self.population
        # Some pipelines carry the doubled batch through the scheduler; the halves are equal and move together.
        doubled = self.branching and len(sample) == 2 * population.log_w.numel()
        half = population.log_w.numel()
        if self.branching:
            model_output = self._branch(model_output, sample[:half], doubled)
        self.catcher.clear()
        self._look(model_output[:half], sample[:half])
        index = population.select(allowed=self.settings.resamples(self.position, steps) and plan.noisy[self.position])
        if index is not None:
            model_output, sample = self._follow(index.to(sample.device), model_output, sample, doubled)
        self.position += 1
        result = original(model_output, timestep, sample, *args, **kw)
        return self._finish(result, doubled) if self.position == steps else result

    # ---- parts -----------------------------------------------------------------------------------------------------

    def _begin(self, sample: Tensor, timestep: Any) -> Population:
        k, rows = self.call.particles, len(sample)
        if self.branching and self.catcher.name in CONDITIONAL_FIRST and self.catcher.guided is None:
            rows //= 2  # the doubled batch itself goes through the scheduler
        if rows % k:
            raise ValueError(f"{rows} latents are no whole number of groups of {k} particles; ask for {k} images per prompt")
        if self.branching and float(torch.as_tensor(timestep).flatten()[0]) != float(self.scheduler.timesteps[0]):
            raise ValueError("the run does not start from noise (image-to-image, a late start): its weights are unknown")
        population = Population(rows // k, k, self.settings.rules, sample.device, self.call.generator)
        if self.settings.target.reward is not None:
            self.steering = Steering(self.settings.target.reward, rows, population.device)
        self.population = population
        return population

    def _branch(self, given: Tensor, sample: Tensor, doubled: bool) -> Tensor:
        """Weigh the branches; the scheduler's input."""
        assert self.population is not None
        exponents = self.settings.target.at(float(self.plan.levels[self.position].t))
        uncond, cond = self.catcher.branches(given)
        mixed = self._mixed(given, uncond, cond, exponents, doubled)
        if self.settings.target.scheduled:
            self._track(sample, cond, uncond)
        if self.settings.weighs(self.position, len(self.plan.levels) - 1):
            outputs = {"uncond": uncond, "cond": cond}
            self.population.add(self._weight(exponents, [outputs[name] for name in self.settings.target.branches]))
        return mixed

    def _look(self, output: Tensor, sample: Tensor) -> None:
        """Weigh by the reward of the x0-predictions; measure what the scheduler will clip."""
        if self.steering is None and self.plan.clip is None:
            return
        assert self.population is not None
        x0 = self._x0(output, sample)
        if self.plan.clip is not None:
            self.beyond.append((x0.abs() > self.plan.clip).float().mean())
        if self.steering is not None and self.position % self.steering.reward.every == 0:
            values = self.steering.score(self.call.decode(x0))
            self.population.add(self.steering.observe(values, float(self.plan.levels[self.position].t)))

    def _mixed(self, given: Tensor, uncond: Tensor, cond: Tensor, exponents: tuple[float, ...], doubled: bool) -> Tensor:
        """The scheduler's input, checked to be what the pipeline says, and redone where the target says otherwise."""
        scale = self.call.scale
        assert scale is not None
        wrong = mismatch(given, uncond + scale * (cond - uncond))
        if self._mismatch is None:
            self._check(wrong, given.dtype)
        self._mismatch = wrong if self._mismatch is None else torch.maximum(self._mismatch, wrong)
        w = dict(zip(self.settings.target.branches, exponents, strict=True)).get("cond", 0.0)
        if abs(w - scale) < 1e-9:
            return given
        mixed = uncond + w * (cond - uncond)
        return torch.cat([mixed, mixed]) if doubled else mixed

    def _check(self, wrong: Tensor, dtype: torch.dtype) -> None:
        tolerance = TOLERANCE.get(dtype, 1e-4)
        if not float(wrong) <= tolerance:
            raise ValueError(
                f"{self.catcher.name} does more to its guidance branches than mix them at scale {self.call.scale:g} (off by "
                f"{float(wrong):.2g} of the largest value): rescaled, normalised or perturbed guidance names no law to sample"
            )

    def _weight(self, exponents: tuple[float, ...], outputs: list[Tensor]) -> Tensor:
        """Differences of outputs are differences of eps and of x0 up to factors that the level knows."""
        now, after = self.plan.levels[self.position], self.plan.levels[self.position + 1]
        _, scale = x0_coefficients(self.plan.prediction_type, now.alpha, now.sigma, self.plan.sigma_data)
        if now.alpha == 0.0:
            return first_weight(exponents, outputs, after) * float(scale) ** 2
        factor = 0.5 * (now.alpha * float(scale) / now.sigma) ** 2 * log_interval(now, after)
        return factor * disagreement(exponents, outputs)

    def _x0(self, output: Tensor, sample: Tensor) -> Tensor:
        level = self.plan.levels[self.position]
        if output.shape[1] == 2 * sample.shape[1]:
            output = output[:, : sample.shape[1]]
        wide = sample.to(torch.promote_types(sample.dtype, torch.float32))
        x = wide * level.alpha if self.plan.scaled else wide
        return to_x0(output, x, level.alpha, level.sigma, self.plan.prediction_type, self.plan.sigma_data)

    def _track(self, sample: Tensor, cond: Tensor, uncond: Tensor) -> None:
        """Follow log q(x|c) - log q(x) along the run and pay for the change of exponents since the last step."""
        assert self.population is not None
        now = self.plan.levels[self.position]
        x = sample.double() * (now.alpha if self.plan.scaled else 1.0) / now.alpha
        eps = [(x - self._x0(o, sample).double()) / now.ratio for o in (cond, uncond)]
        if self._previous is None:
            self._log_ratio = torch.zeros(len(x), dtype=torch.float64, device=self.population.device)
        else:
            before, change = self.plan.levels[self.position - 1], x - self._previous[0]
            gains = [log_density_change(e, change, before, now).to(self.population.device) for e in self._previous[1]]
            assert self._log_ratio is not None
            self._log_ratio = self._log_ratio + gains[0] - gains[1]
            w = [self._scale_at(float(level.t)) for level in (before, now)]
            if w[0] != w[1]:
                self.population.add((w[1] - w[0]) * self._log_ratio)
        self._previous = (x, eps)

    def _scale_at(self, t: float) -> float:
        return dict(zip(self.settings.target.branches, self.settings.target.at(t), strict=True)).get("cond", 0.0)

    def _follow(self, index: Tensor, model_output: Tensor, sample: Tensor, doubled: bool) -> tuple[Tensor, Tensor]:
        if self.steering is not None:
            self.steering.select(index.to(self.steering.spent.device))
        if self._log_ratio is not None and self._previous is not None:
            self._log_ratio = self._log_ratio[index.to(self._log_ratio.device)]
            self._previous = (self._previous[0][index], [e[index] for e in self._previous[1]])
        rows = torch.cat([index, index + len(index)]) if doubled else index
        permute(self.scheduler, rows)
        return model_output[rows], sample[rows]

    def _finish(self, result: Any, doubled: bool) -> Any:
        population = self.population
        assert population is not None
        if self._mismatch is not None:
            self._check(self._mismatch, torch.float16 if result[0].dtype not in TOLERANCE else result[0].dtype)
        groups, k = population.shape
        if self.steering is not None:
            latents = result[0][: groups * k]
            level = self.plan.levels[-1]
            scale = 1.0 if self.plan.scaled else level.alpha
            population.add(self.steering.finish(self.steering.score(self.call.decode(latents / scale)), float(level.t)))
        self.kept = population.pick(self.call.pick, self.call.generator)
        if self.call.pick == "all":
            return result
        rows = self.kept.to(result[0].device)
        rows = torch.cat([rows, rows + groups * k]) if doubled else rows
        if isinstance(result, tuple):
            return tuple(v[rows] if torch.is_tensor(v) else v for v in result)
        return type(result)(**{name: v[rows] if torch.is_tensor(v) else v for name, v in result.items()})


class Run:
    """What the last corrected call did; yielded by `attach`, filled while the pipeline runs."""

    def __init__(self, particles: int) -> None:
        """Nothing has run yet."""
        self.particles = particles
        self.steps: Steps | None = None

    def _population(self) -> Population:
        if self.steps is None or self.steps.population is None:
            raise RuntimeError("no corrected run yet: call the pipeline inside the block first")
        return self.steps.population

    @property
    def log_w(self) -> Tensor:
        """(P K,) log-weights since the last resampling, prompt-major: one for each particle."""
        return self._population().log_w.reshape(-1)

    @property
    def log_z(self) -> Tensor:
        """(P,) log of each prompt's normaliser, present weights included."""
        return self._population().total_log_z()

    @property
    def trace(self) -> Trace:
        """Everything recorded step by step."""
        return self._population().trace

    @property
    def ess(self) -> Tensor:
        """(steps, P) effective sample sizes before resampling."""
        return torch.stack(self.trace.ess)

    @property
    def ancestors(self) -> Tensor:
        """(steps, P, K) the particle each one continues."""
        return torch.stack(self.trace.ancestors)

    @property
    def kept(self) -> Tensor:
        """Rows of the particles that were decoded, all or one per prompt."""
        self._population()
        assert self.steps is not None
        if self.steps.kept is None:
            raise RuntimeError("the run has not finished")
        return self.steps.kept

    @property
    def longest_step(self) -> float:
        """The longest step that was weighed, as ln(s / s') of its noise-to-signal ratios.

        Weights are taken at the start of a step. Above about 0.5, strong guidance overpays particles that are far out; a grid
        that is uniform in log SNR has the shortest longest step.
        """
        self._population()
        assert self.steps is not None
        levels = self.steps.plan.levels
        return max((0.5 * log_interval(a, b) for a, b in pairwise(levels) if a.alpha > 0.0), default=0.0)

    @property
    def approximations(self) -> dict[str, float]:
        """What bent exactness in this run, each with its size; empty for an exact one.

        "x0 values clipped by the scheduler", "log-weights withheld by tempering", "increments clipped": shares. "signal where
        the noise starts": share of variance that data would have at the first step, which starts from noise alone; from 1%.
        """
        found = {"log-weights withheld by tempering": 1.0 - self.trace.applied()}
        found["increments clipped"] = self.trace.clipped_share()
        assert self.steps is not None
        if self.steps.beyond:
            found["x0 values clipped by the scheduler"] = float(torch.stack(self.steps.beyond).mean())
        signal = 1.0 / (1.0 + self.steps.plan.levels[0].ratio ** 2)
        found["signal where the noise starts"] = signal if signal >= 0.01 else 0.0
        return {name: share for name, share in found.items() if share > 1e-12}

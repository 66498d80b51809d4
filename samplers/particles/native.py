"""The reference loop of `FeynmanKac.sample`: observe, reweight, resample, move."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..engine import Denoiser
from ..noise import NoiseSchedule
from .cloud import Cloud, Population
from .path import (
    Level,
    first_weight,
    levels_of,
    log_density_change,
    log_gaussian_integral,
    log_interval,
    move,
    rate,
)
from .potentials import Steering
from .settings import Settings


def run(
    fk: Settings,
    denoisers: Sequence[Denoiser],
    noise_schedule: NoiseSchedule,
    times: Tensor | Sequence[float],
    *,
    particles: int,
    shape: tuple[int, ...],
    groups: int | None,
    generator: torch.Generator | None,
    dtype: torch.dtype,
    device: torch.device,
    batch_size: int | None,
    progress: Callable[[int], None],
) -> Cloud:
    """See `FeynmanKac.sample`, which checks the arguments; ``denoisers`` in the order of the target's branches."""
    levels = levels_of(noise_schedule, times)
    walk = _Walk(fk, levels, (groups or 1, particles, *shape), generator, dtype, device)
    steps = len(levels) - 1
    grad = fk.target.reward is not None and fk.target.reward.gradient
    for step in range(steps):
        with torch.set_grad_enabled(grad):
            x = walk.x.detach().requires_grad_(grad)
            outputs = [_evaluate(denoiser, x, levels[step].t, batch_size) for denoiser in denoisers]
            walk.observe(step, x, outputs)
        progress(step + 1)
    walk.finish()
    population, trace = walk.population, walk.population.trace
    log_z = population.total_log_z() + walk.offset
    stack = {name: torch.stack(getattr(trace, name)) for name in ("ess", "ancestors")}
    x, log_w = walk.x.reshape(*population.shape, *shape), population.log_w
    if groups is None:
        x, log_w, log_z = x[0], log_w[0], log_z[0]
        stack = {name: value[:, 0] for name, value in stack.items()}
    return Cloud(x, log_w, log_z, stack["ess"], stack["ancestors"], trace, steps * len(denoisers))


def _evaluate(denoiser: Denoiser, x: Tensor, t: Tensor, batch_size: int | None) -> Tensor:
    parts = [x] if batch_size is None else x.split(batch_size)
    out = torch.cat([denoiser(part, t) for part in parts]) if len(parts) > 1 else denoiser(x, t)
    if out.shape != x.shape:
        raise ValueError(f"a denoiser returned shape {tuple(out.shape)} for particles of shape {tuple(x.shape)}")
    return out


class _Walk:
    """The particles on their way: one call of `observe` per step."""

    def __init__(
        self,
        fk: Settings,
        levels: list[Level],
        size: tuple[int, ...],
        generator: torch.Generator | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.fk, self.levels, self.generator = fk, levels, generator
        self.exponents = [fk.target.at(float(level.t)) for level in levels]
        groups, particles, *shape = size
        first, total = levels[0], sum(self.exponents[0])
        if first.alpha == 0.0 and any(abs(sum(g) - 1.0) > 1e-12 for g in self.exponents):
            raise ValueError(
                f"exponents with sum {total:g} cannot start at pure noise (alpha = 0): every step there has infinite weight; "
                "start the times a little later"
            )
        if first.alpha == 0.0 and fk.target.scheduled:
            raise ValueError(
                "exponents that vary in time cannot start at pure noise (alpha = 0); start the times a little later"
            )
        self.dimension = torch.Size(shape).numel()
        noise = self._randn((groups * particles, *shape), dtype, device)
        self.x = noise * (first.sigma / total**0.5)
        self.population = Population(groups, particles, fk.rules, device, generator)
        self.steering = None
        if fk.target.reward is not None:
            self.steering = Steering(fk.target.reward, len(self.x), self.population.device)
        self.start = log_gaussian_integral(total, self.dimension, first)
        self.log_q: list[Tensor] = []
        if fk.target.scheduled:
            squares = noise.flatten(1).to(torch.float64).square().sum(-1) / total
            at_start = -0.5 * (squares + self.dimension * torch.log(torch.tensor(2 * torch.pi * first.ratio**2)))
            self.log_q = [at_start.to(self.population.device) for _ in self.exponents[0]]

    @property
    def offset(self) -> float:
        """Log Z of the starting law, and the change from x / alpha to x at the last level."""
        last = self.levels[-1]
        if last.alpha == 1.0:
            return self.start
        total = sum(self.exponents[-1])
        return self.start + self.dimension * (1.0 - total) * float(torch.log(torch.tensor(last.alpha, dtype=torch.float64)))

    def observe(self, step: int, x: Tensor, x0: list[Tensor]) -> None:
        """Reweight by the branches' x0-predictions at ``x``, resample, move to the next level."""
        fk, population = self.fk, self.population
        now, after, g = self.levels[step], self.levels[step + 1], self.exponents[step]
        steps, total = len(self.levels) - 1, sum(g)
        mean = sum(weight / total * d for weight, d in zip(g, x0, strict=True))
        if fk.weighs(step, steps):
            population.add(self._weight(now, after, g, x, x0))
        push = None
        if self.steering is not None and step % self.steering.reward.every == 0:
            values = self.steering.score(mean)
            if self.steering.reward.gradient:
                push = torch.autograd.grad(self.steering.reward.at(float(now.t)) * values.sum(), x)[0]
            population.add(self.steering.observe(values.detach(), float(now.t)))
        x, mean = x.detach(), mean.detach()
        eps = [((x - now.alpha * d.detach()) / now.sigma) for d in x0] if self.log_q else []
        shift = move(now, after, total, fk.noise)
        index = population.select(allowed=fk.resamples(step, steps) and (shift.noise > 0 or fk.noise == 0))
        if index is not None:
            x, mean, eps, push = self._follow(index, x, mean, eps, push)
        moved = shift.keep * x + shift.pull * mean
        if shift.noise > 0:
            z = self._randn(moved.shape, moved.dtype, moved.device)
            if push is not None:
                tilt = shift.noise * push  # the mean moves by variance x gradient; the kernels' ratio pays for it
                population.add(-(tilt * z + 0.5 * tilt.square()).flatten(1).sum(-1, dtype=torch.float64))
                z = z + tilt
            moved = moved + shift.noise * z
        if self.log_q:
            self._track(step, moved / after.alpha - x / now.alpha, eps)
        self.x = moved

    def _weight(self, now: Level, after: Level, g: tuple[float, ...], x: Tensor, x0: list[Tensor]) -> Tensor:
        x0 = [d.detach() for d in x0]
        if now.alpha == 0.0:
            return first_weight(g, x0, after)
        eps = [(x.detach() - now.alpha * d) / now.sigma for d in x0]
        return 0.5 * rate(g, eps) * log_interval(now, after)

    def _follow(
        self, index: Tensor, x: Tensor, mean: Tensor, eps: list[Tensor], push: Tensor | None
    ) -> tuple[Tensor, Tensor, list[Tensor], Tensor | None]:
        if self.steering is not None:
            self.steering.select(index)
        self.log_q = [q[index] for q in self.log_q]
        index = index.to(x.device)
        return x[index], mean[index], [e[index] for e in eps], None if push is None else push[index]

    def _track(self, step: int, change: Tensor, eps: list[Tensor]) -> None:
        """Carry the log-densities along and pay for the change of exponents at the new level."""
        now, after = self.levels[step], self.levels[step + 1]
        self.log_q = [q + log_density_change(e, change, now, after).to(q.device) for q, e in zip(self.log_q, eps, strict=True)]
        jumps = [b - a for a, b in zip(self.exponents[step], self.exponents[step + 1], strict=True)]
        if any(jumps):
            self.population.add(sum(jump * q for jump, q in zip(jumps, self.log_q, strict=True)))

    def finish(self) -> None:
        """The reward of the result."""
        if self.steering is not None:
            values = self.steering.score(self.x).detach()
            self.population.add(self.steering.finish(values, float(self.levels[-1].t)))

    def _randn(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        at = device if self.generator is None else self.generator.device
        return torch.randn(tuple(shape), generator=self.generator, dtype=dtype, device=at).to(device)

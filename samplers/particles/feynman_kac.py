"""Feynman-Kac correctors: the entry points `FeynmanKac.sample` and `FeynmanKac.attach`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..discrete import MaskedProcess, Model
from ..engine import Denoiser
from ..noise import NoiseSchedule
from .cloud import Cloud
from .discrete import run_discrete
from .native import run
from .settings import Settings


class FeynmanKac(Settings):
    """Sequential Monte Carlo along a diffusion path whose weighted particles follow a `Target`; see `Settings`.

    fk = FeynmanKac(Target.cfg(2.0), resampling="systematic", ess=0.5, noise=1.0)
    cloud = fk.sample({"uncond": a, "cond": b}, noise_schedule, times, particles=64, shape=(2,), generator=g)
    """

    def sample(
        self,
        denoisers: Mapping[str, Denoiser],
        noise_schedule: NoiseSchedule,
        times: Tensor | Sequence[float],
        *,
        particles: int,
        shape: Sequence[int],
        groups: int | None = None,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        batch_size: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Cloud:
        """Run the corrector from Gaussian noise to the last time.

        The population starts from N(0, sigma^2 / G) at ``times[0]``, which is the target where every branch is pure noise
        there. One evaluation of every branch per step.

        Args:
            denoisers: one for each branch of the target, ``denoiser(x: (B, *E), t) -> x0``, all of one noise schedule.
            noise_schedule: the denoisers'.
            times: decreasing grid in its t; ``schedule.times`` of any solver schedule will do.
            particles: K.
            shape: (*E) of one particle.
            groups: independent populations run side by side; adds a leading axis to the result. None is one, without the axis.
            generator: source of all randomness.
            dtype: of the particles; weights are float64 always.
            device: where they live.
            batch_size: largest batch of a network call; None is all particles of all groups.
            progress: called with the number of steps done.

        Returns:
            The weighted particles at ``times[-1]``.

        Raises:
            ValueError: denoisers that do not match the target's branches; times that do not decrease, or that begin at pure
                noise (alpha = 0) while G is not 1; exponents that vary while ``noise`` is not 1; fewer than one particle.
        """
        branches = self.target.branches
        self._check_branches(denoisers, "denoisers")
        for name, value in (("particles", particles), ("groups", groups), ("batch_size", batch_size)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point type, got {dtype}")
        if self.target.scheduled and self.noise != 1.0:
            raise ValueError(
                f"exponents that vary in time need noise=1.0, got {self.noise}: log-densities can be followed only where the "
                "path's noise is the model's"
            )
        return run(
            self, [denoisers[name] for name in branches], noise_schedule, times, particles=particles, shape=tuple(shape),
            groups=groups, generator=generator, dtype=dtype, device=torch.device(device), batch_size=batch_size,
            progress=progress or (lambda done: None),
        )  # fmt: skip

    def sample_discrete(
        self,
        models: Mapping[str, Model],
        process: MaskedProcess,
        length: int,
        *,
        particles: int,
        nfe: int | None = None,
        groups: int | None = None,
        generator: torch.Generator | None = None,
        device: str | torch.device = "cpu",
        progress: Callable[[int], None] | None = None,
    ) -> Cloud:
        """Run the corrector of a masked token model, from all masks to none; see `samplers.particles.discrete`.

        Args:
            models: one for each branch of the target, ``model(x: (B, L) ids, t) -> (B, L, V)`` posteriors.
            process: the masked process they share.
            length: L.
            particles: K.
            nfe: evaluations of every branch, 1..L; None is L, one token at a time, where weights are exact.
            groups: as in `sample`.
            generator: source of all randomness.
            device: where the ids live.
            progress: called with the number of steps done.

        Returns:
            The weighted sequences, ``x`` (K, L) int64; ``log_z`` is the log of the sum of the unnormalised target. A reward
            sees the present tokens with the likeliest ones at masked sites.

        Raises:
            ValueError: another process, models that do not match the branches, varying exponents, numbers out of range.
        """
        if not isinstance(process, MaskedProcess):
            raise ValueError(f"correctors need masked noise, not {type(process).__name__}")
        self._check_branches(models, "models")
        if self.target.scheduled:
            raise ValueError("exponents of a discrete target must be constant")
        if self.target.reward is not None and self.target.reward.gradient:
            raise ValueError("tokens have no reward gradient; use gradient=False")
        nfe = length if nfe is None else nfe
        for name, value in (("length", length), ("particles", particles), ("groups", groups), ("nfe", nfe)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
        if nfe > length:
            raise ValueError(f"{length} tokens take at most {length} evaluations, got nfe={nfe}")
        return run_discrete(
            self, models, process, length, particles=particles, nfe=nfe, groups=groups, generator=generator,
            device=torch.device(device), progress=progress or (lambda done: None),
        )  # fmt: skip

    def _check_branches(self, given: Mapping[str, Any], what: str) -> None:
        missing = [name for name in self.target.branches if name not in given]
        unknown = [name for name in given if name not in self.target.exponents]
        if missing or unknown:
            raise ValueError(
                f"the target's branches are {', '.join(self.target.exponents)}; "
                f"missing {what}: {', '.join(missing) or 'none'}; unknown ones: {', '.join(unknown) or 'none'}"
            )

    def attach(self, pipe: Any, particles: int, **options: Any) -> AbstractContextManager[Any]:
        """Correct an unmodified diffusers pipeline inside the block; see `samplers.particles.hooks.attach`."""
        from .hooks import attach

        return attach(self, pipe, particles, **options)

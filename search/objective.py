"""What a schedule is worth: a number, lower is better, the same noises for every candidate."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from samplers import NoiseSchedule, SolverSchedule, sample
from samplers.engine import Denoiser
from samplers.evaluation import FeatureMoments, FrechetReference

from .converged import Teacher, noise_name, of_rows, teacher, tensor_bytes

PENALTY = 1e6  # of candidates whose samples are not finite; large, finite and the same for all

Term = Callable[[Tensor], float]  # samples (B, *E) -> value
Features = Callable[[Tensor], Tensor]  # samples (B, *E) -> (B, D)


@dataclass(frozen=True)
class Objective:
    """A number for every schedule.

    Build one with `endpoint`, `distance` or `mean`.

    Attributes:
        denoiser: ``(x, t) -> x0``.
        noise_schedule: the denoiser's.
        x_T: (B, *E) starting noises, shared by all candidates.
        terms: named functions of the samples with their weights; the value is the weighted sum.
        reference: (B, *E) the converged solutions from ``x_T``, or None for objectives without one.
        reference_error: how far the reference may be from converged (RMSE to the one with half the evaluations).
        first_x0: (*E) the data's mean, for analytic first steps from it, or None.
        final_time: where the reference ends.
        batch_size: samples at once; all when None.
        settings: what decides the value, JSON-native; `digest` is made of it.
    """

    denoiser: Denoiser
    noise_schedule: NoiseSchedule
    x_T: Tensor
    terms: tuple[tuple[str, float, Term], ...]
    reference: Tensor | None = None
    reference_error: float = 0.0
    first_x0: Tensor | None = None
    final_time: float = 0.0
    batch_size: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    # ---- kinds ---------------------------------------------------------------------------------------------------

    @classmethod
    def endpoint(
        cls,
        denoiser: Denoiser,
        noise_schedule: NoiseSchedule,
        x_T: Tensor,
        reference_nfe: int = 200,
        *,
        final_time: float = 0.0,
        first_x0: Tensor | None = None,
        multi_scale: float = 0.0,
        moments: float = 0.0,
        features: Features | None = None,
        feature_weight: float = 1.0,
        batch_size: int | None = None,
        cache: str | Path | None = None,
        model: str = "",
    ) -> Objective:
        """Root mean squared error to the converged solution from the same noises, in x0's units.

        Args:
            denoiser: ``(x, t) -> x0``, x (B, *E).
            noise_schedule: the denoiser's.
            x_T: (B, *E) starting noises at t_max; 32 to 256 of them rank schedules well.
            reference_nfe: evaluations of the converged solution.
            final_time: 0 (sigma = 0) or the noise schedule's t_min.
            first_x0: (*E) the data's mean; allows "average_x0" first steps.
            multi_scale: weight of the RMSE after averaging 2x2 and 4x4 pixels, for images.
            moments: weight of the difference in channel means and standard deviations: lost contrast is what few steps show.
            features: perceptual features (B, *E) -> (B, D); their RMSE is added with ``feature_weight``.
            feature_weight: see above.
            batch_size: samples at once.
            cache: folder for the converged solution, see `search.teacher`.
            model: what identifies the denoiser; required with ``cache`` and for evaluations shared between processes.

        Raises:
            ValueError: see `search.teacher`; also an ``x_T`` that is no batch, and scales for what is no image.
        """
        if x_T.ndim < 2 or not x_T.is_floating_point():
            raise ValueError(f"x_T must be floating-point noises (B, *E), got {tuple(x_T.shape)} {x_T.dtype}")
        if multi_scale and (x_T.ndim != 4 or min(x_T.shape[-2:]) < 4):
            raise ValueError(f"multi_scale needs images (B, C, H, W) of at least 4x4, got {tuple(x_T.shape)}")
        found: Teacher = teacher(
            denoiser,
            noise_schedule,
            x_T,
            nfe=reference_nfe,
            final_time=final_time,
            batch_size=batch_size,
            cache=cache,
            model=model,
        )
        reference = found.solution.to(x_T.device)
        terms: list[tuple[str, float, Term]] = [("rmse", 1.0, lambda x: _rmse(x, reference))]
        if multi_scale:
            scales = [(k, avg_pool2d(reference, k)) for k in (2, 4)]
            terms += [(f"rmse/{k}", multi_scale, lambda x, k=k, r=r: _rmse(avg_pool2d(x, k), r)) for k, r in scales]
        if moments:
            wanted = _moments(reference)
            terms.append(("moments", moments, lambda x: _rmse(_moments(x), wanted)))
        if features is not None:
            seen = features(reference)
            terms.append(("features", feature_weight, lambda x: _rmse(features(x), seen)))
        settings = {
            "kind": "endpoint", "reference_nfe": reference_nfe, "final_time": final_time, "multi_scale": multi_scale,
            "moments": moments, "feature_weight": feature_weight, "noises": len(x_T), "model": model,
            "features": None if features is None else str(getattr(features, "name", type(features).__name__)),
        }  # fmt: skip
        return cls(
            denoiser, noise_schedule, x_T, tuple(terms), reference, found.error, first_x0, final_time, batch_size, settings
        )  # fmt: skip

    @classmethod
    def distance(
        cls,
        denoiser: Denoiser,
        noise_schedule: NoiseSchedule,
        x_T: Tensor,
        reference: FeatureMoments | FrechetReference,
        features: Features,
        *,
        name: str,
        first_x0: Tensor | None = None,
        final_time: float = 0.0,
        batch_size: int | None = None,
        model: str = "",
    ) -> Objective:
        """Squared Frechet distance between the samples' features and a reference's; only comparable at the same ``len(x_T)``.

        Args:
            denoiser: ``(x, t) -> x0``.
            noise_schedule: the denoiser's.
            x_T: (B, *E) noises.
            reference: of real data, with the same features; factorised once.
            features: (B, *E) -> (B, D).
            name: of the features; goes into digests and reports.
            first_x0: the data's mean.
            final_time: where schedules end.
            batch_size: samples at once.
            model: what identifies the denoiser.
        """
        factorised = FrechetReference.from_moments(reference) if isinstance(reference, FeatureMoments) else reference
        terms = ((name, 1.0, lambda x: factorised.distance_to_features(features(x).double())),)
        content = hashlib.sha256(tensor_bytes(factorised.mu) + tensor_bytes(factorised.sigma)).hexdigest()[:16]
        settings = {"kind": "distance", "features": name, "reference": content, "noises": len(x_T), "model": model}
        return cls(denoiser, noise_schedule, x_T, terms, None, 0.0, first_x0, final_time, batch_size, settings)

    @classmethod
    def mean(cls, objectives: Sequence[Objective]) -> MeanObjective:
        """The average over several, as over prompts and guidance scales of a text-to-image model.

        Raises:
            ValueError: none, or objectives whose schedules are not of one kind.
        """
        return MeanObjective(tuple(objectives))

    # ---- use -----------------------------------------------------------------------------------------------------

    @cached_property
    def digest(self) -> str:
        """Hash of everything that decides the value."""
        parts = [
            json.dumps(self.settings, sort_keys=True).encode(),
            noise_name(self.noise_schedule).encode(),
            tensor_bytes(self.x_T),
        ]
        parts += [tensor_bytes(t) for t in (self.reference, self.first_x0) if t is not None]
        parts.append(json.dumps([(name, weight) for name, weight, _ in self.terms]).encode())
        return hashlib.sha256(b"|".join(parts)).hexdigest()[:16]

    @property
    def identity(self) -> str:
        """Hash of what was asked for: as `digest`, without the reference, which differs in the last bits between machines."""
        parts = [
            json.dumps(self.settings, sort_keys=True).encode(),
            noise_name(self.noise_schedule).encode(),
            tensor_bytes(self.x_T),
        ]
        return hashlib.sha256(b"|".join(parts)).hexdigest()[:8]

    @property
    def cost(self) -> int:
        """Samples that one evaluation of a schedule draws; times its NFE gives the network's work."""
        return len(self.x_T)

    def head(self, count: int) -> Objective:
        """The plain endpoint error on the first ``count`` noises.

        Raises:
            ValueError: an objective without a converged reference.
        """
        if self.reference is None:
            raise ValueError("only endpoint objectives, which have a converged reference, can be cut short")
        reference = self.reference[:count]
        terms = (("rmse", 1.0, lambda x: _rmse(x, reference)),)
        settings = {**self.settings, "noises": len(reference)}
        return replace(self, x_T=self.x_T[:count], reference=reference, terms=terms, settings=settings)

    def samples(self, schedule: SolverSchedule) -> Tensor:
        """(B, *E) what the schedule makes of ``x_T``."""
        mean = self.first_x0 if schedule.steps[0].eval.source == "average_x0" else None
        noise = torch.Generator(self.x_T.device).manual_seed(0)  # stochastic steps draw the same for every candidate too
        with torch.no_grad():
            parts = [
                self.solve(schedule, rows, first_x0=mean, generator=noise)
                for rows in torch.arange(len(self.x_T)).split(self.batch_size or max(len(self.x_T), 1))
            ]
        return torch.cat(parts)

    def solve(self, schedule: SolverSchedule, rows: Tensor, **options: Any) -> Tensor:
        """(len(rows), *E) samples from some of the noises, each under its own condition; ``options`` of `samplers.sample`."""
        return sample(of_rows(self.denoiser, rows), self.x_T[rows], schedule, self.noise_schedule, **options)

    def evaluate(self, schedule: SolverSchedule) -> dict[str, float]:
        """Every term by name, and their weighted sum as "value"; samples that are not finite cost `PENALTY`."""
        x = self.samples(schedule)
        if not bool(x.isfinite().all()):
            return {"value": PENALTY}
        values = {name: term(x) for name, _, term in self.terms}
        total = sum(weight * values[name] for name, weight, _ in self.terms)
        return {"value": total if math.isfinite(total) and total < PENALTY else PENALTY, **values}

    def __call__(self, schedule: SolverSchedule) -> float:
        """The value: lower is better, never NaN or infinite."""
        return self.evaluate(schedule)["value"]


@dataclass(frozen=True)
class MeanObjective:
    """The mean of several objectives; see `Objective.mean`."""

    parts: tuple[Objective, ...]

    def __post_init__(self) -> None:
        """Check that the parts agree."""
        if not self.parts:
            raise ValueError("a mean needs at least one objective")
        if len({(part.noise_schedule.kind, part.final_time) for part in self.parts}) > 1:
            raise ValueError("objectives with different noise schedules or final times have no common schedules")

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """The parts' own."""
        return self.parts[0].noise_schedule

    @property
    def first_x0(self) -> Tensor | None:
        """The data's mean, where every part has one."""
        return self.parts[0].first_x0 if all(part.first_x0 is not None for part in self.parts) else None

    @property
    def final_time(self) -> float:
        """Where schedules end."""
        return self.parts[0].final_time

    @property
    def reference_error(self) -> float:
        """The worst of the parts'."""
        return max(part.reference_error for part in self.parts)

    @property
    def settings(self) -> dict[str, Any]:
        """Of every part."""
        return {"kind": "mean", "parts": [part.settings for part in self.parts]}

    @cached_property
    def digest(self) -> str:
        """Hash of everything that decides the value."""
        return hashlib.sha256("".join(part.digest for part in self.parts).encode()).hexdigest()[:16]

    @property
    def identity(self) -> str:
        """Hash of what was asked for."""
        return hashlib.sha256("".join(part.identity for part in self.parts).encode()).hexdigest()[:8]

    @property
    def cost(self) -> int:
        """Samples per evaluation."""
        return sum(part.cost for part in self.parts)

    def evaluate(self, schedule: SolverSchedule) -> dict[str, float]:
        """Every part's value by its number, and their mean as "value"."""
        values = [part(schedule) for part in self.parts]
        return {"value": sum(values) / len(values), **{str(i): value for i, value in enumerate(values)}}

    def __call__(self, schedule: SolverSchedule) -> float:
        """The mean of the parts' values."""
        return self.evaluate(schedule)["value"]


def _rmse(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).square().mean().sqrt().item()


def _moments(x: Tensor) -> Tensor:
    """(B, 2 C): mean and standard deviation of every channel of every sample."""
    flat = x.flatten(2) if x.ndim > 2 else x[:, None]
    return torch.cat([flat.mean(-1), flat.std(-1)], dim=1)

"""The statistics as data: per-pixel numbers on a grid even in lambda, their files and their smaller forms."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import msgspec
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..noise import NoiseSchedule
from ..strategy import ScalarStatistics, SolverSchedule
from .grid import node_grid

FORMAT = "empirical-statistics/1"
UNEVEN = 1e-4  # how far steps of the grid may differ, relative: float32 grids are accepted


@dataclass(frozen=True, eq=False)
class EmpiricalStatistics:
    r"""Statistics $(l, s, b)$ of a model, with which its sampling ODE has a smaller first-order error.

    With $f = (\sigma\epsilon - l x) / \alpha$, $l$ takes the linear part out of the network along its own trajectories and
    $s f + b$ is the best linear guess of $df/d\lambda$ (arXiv:2310.13268, eq. 5, 9 and 10). (1, 0, 0) makes the v3 step the
    data form and (0, -1, 0) the noise form.

    Attributes:
        lam: (n + 1,) float64, increasing by equal steps: half log-SNR of the nodes.
        l: (n + 1, *E) where E broadcasts to a sample's shape; () is one number per node.
        s: (n + 1, *E).
        b: (n + 1, *E).
        provenance: anything JSON about where they come from.
    """

    lam: Tensor
    l: Tensor
    s: Tensor
    b: Tensor
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what cannot be read as statistics.

        Raises:
            ValueError: shapes that differ, a grid that is not even and increasing, or a value that is not finite.
        """
        lam = torch.as_tensor(self.lam, dtype=torch.float64)
        object.__setattr__(self, "lam", lam)
        if lam.ndim != 1 or len(lam) < 2:
            raise ValueError(f"lam must have shape (n + 1,) with n >= 1, got {tuple(lam.shape)}")
        width = (lam[-1] - lam[0]) / (len(lam) - 1)
        if not bool(torch.isfinite(lam).all()) or not width > 0 or bool(((lam.diff() - width).abs() > UNEVEN * width).any()):
            raise ValueError(f"lam must increase by equal steps, got steps from {lam.diff().min():g} to {lam.diff().max():g}")
        for name in ("l", "s", "b"):
            value = torch.as_tensor(getattr(self, name))
            value = value if value.is_floating_point() else value.to(torch.float64)
            object.__setattr__(self, name, value)
            if value.ndim < 1 or len(value) != len(lam) or value.shape != self.l.shape:
                expected = tuple(self.l.shape) if len(self.l) == len(lam) else (len(lam), "...")
                raise ValueError(f"{name} must have shape {expected}, one entry per node of lam, got {tuple(value.shape)}")
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"{name} holds values that are not finite")

    @property
    def shape(self) -> torch.Size:
        """E: what broadcasts to a sample's shape."""
        return self.l.shape[1:]

    @property
    def width(self) -> float:
        """Lambda between two nodes."""
        return ((self.lam[-1] - self.lam[0]) / (len(self.lam) - 1)).item()

    @property
    def constant(self) -> bool:
        """Whether every node has the same statistics."""
        return all(bool((value == value[:1]).all()) for value in (self.l, self.s, self.b))

    def embed(self, schedule: SolverSchedule) -> SolverSchedule:
        """``schedule`` with these statistics inside, so that it needs no file of them.

        Raises:
            ValueError: these statistics are not one number per node, as estimates with ``pool="all"`` are. (The mean over
                elements of finer statistics is something else, and worse than none.)
        """
        if self.shape:
            raise ValueError(f"only one number per node fits into a schedule, got shape {tuple(self.shape)}; use pool='all'")
        first, last = self.lam[0].item(), self.lam[-1].item()
        l, s, b = (tuple(value.double().tolist()) for value in (self.l, self.s, self.b))
        return msgspec.structs.replace(schedule, statistics=ScalarStatistics(lam=(first, last), l=l, s=s, b=b))

    @classmethod
    def of(cls, schedule: SolverSchedule) -> EmpiricalStatistics | None:
        """The statistics that `embed` put into ``schedule``, or None."""
        inside = schedule.statistics
        if inside is None:
            return None
        lam = torch.linspace(*inside.lam, len(inside.l), dtype=torch.float64)
        l, s, b = (torch.tensor(value, dtype=torch.float64) for value in (inside.l, inside.s, inside.b))
        return cls(lam, l, s, b)

    @classmethod
    def estimate(
        cls,
        denoiser: Callable[[Tensor, Tensor], Tensor],
        noise_schedule: NoiseSchedule,
        x0_batch: Tensor | Iterable[Tensor],
        nodes: int = 120,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> EmpiricalStatistics:
        """Estimate them from data, or from samples of a teacher, noised to every node.

        Needs at every node and batch one Jacobian-vector product per probe and two evaluations.

        Args:
            denoiser: ``denoiser(x, t) -> x0``, differentiable in x.
            noise_schedule: the denoiser's.
            x0_batch: (N, *E) floating point, or an iterable of such batches (read once). Estimates are as noisy as
                1 / sqrt(N); a thousand samples are a good start.
            nodes: n; the grid has n + 1 nodes even in lambda.
            generator: decides the noise and the probes.
            options: ``batch_size`` (64) splits a tensor; ``t_start`` and ``t_end`` bound the grid (t_max and t_min; where
                alpha is 0 at t_max, lambda starts at -7); ``pool`` "none", "channels" or "all": one set of numbers per
                element, per channel, or in total; ``probes`` (1) random vectors of the diagonal's estimate; ``derivatives``
                "forward" (exact) or "difference" (for networks with an operator that has no forward mode); ``checkpoint``:
                a file that is written after every batch and resumed from, given the same data in the same order;
                ``progress(done, total)``: called after every node, ``total`` None for an iterable without length.

        Raises:
            ValueError: values out of range, batches that do not fit, or a checkpoint of another estimate.
            RuntimeError: no forward-mode derivative; the message says what to do.
        """
        from .estimate import estimate

        return cls(*estimate(denoiser, noise_schedule, x0_batch, nodes, generator, **options))

    # ---- files -------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all."""
        path = Path(path)
        partial = path.with_name(path.name + ".part")
        tensors = {name: getattr(self, name).detach().cpu().contiguous() for name in ("lam", "l", "s", "b")}
        save_file(tensors, partial, {"format": FORMAT, "provenance": json.dumps(dict(self.provenance))})
        partial.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> EmpiricalStatistics:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a safetensors file, or not one of statistics; the message says what it lacks.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file of empirical model statistics")
        try:
            with safe_open(path, framework="pt") as file:
                missing = sorted({"lam", "l", "s", "b"} - set(file.keys()))
                if missing:
                    raise ValueError(f"{path}: not empirical model statistics: no {', '.join(missing)} among its tensors")
                lam, l, s, b = (file.get_tensor(name) for name in ("lam", "l", "s", "b"))
                provenance = json.loads((file.metadata() or {}).get("provenance", "{}"))
        except SafetensorError as error:
            raise ValueError(f"{path}: not a safetensors file: {error}") from None
        try:
            return cls(lam, l, s, b, provenance)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_npz(
        cls,
        folder: str | Path,
        noise_schedule: NoiseSchedule,
        *,
        t_end: float,
        t_start: float | None = None,
    ) -> EmpiricalStatistics:
        """Read the pair ``l.npz`` and ``sb.npz`` in which the authors of DPM-Solver-v3 publish statistics.

        Args:
            folder: where the two files are.
            noise_schedule: of the model they were made for; the files do not hold lambda.
            t_end: the cleanest time they were made for; it begins the published folder's name, as in "0.0001_1200_4096".
            t_start: the noisiest; t_max when None.

        Raises:
            FileNotFoundError: one of the files is missing.
            ValueError: they lack l, s or b, or hold something else than arrays of one shape.
        """
        arrays: dict[str, Tensor] = {}
        for file, names in (("l.npz", ("l",)), ("sb.npz", ("s", "b"))):
            path = Path(folder) / file
            if not path.is_file():
                raise FileNotFoundError(f"{path}: no such file; published statistics are a folder with l.npz and sb.npz")
            try:
                with np.load(path, allow_pickle=False) as content:
                    arrays |= {name: torch.from_numpy(np.asarray(content[name])) for name in names}
            except (KeyError, ValueError, TypeError, OSError, BadZipFile) as error:
                raise ValueError(f"{path}: not an archive with {' and '.join(names)}: {error}") from None
        lam = node_grid(noise_schedule, len(arrays["l"]) - 1, t_start, t_end)
        return cls(lam, arrays["l"], arrays["s"], arrays["b"], {"imported_from": "npz", "path": noise_schedule.kind})

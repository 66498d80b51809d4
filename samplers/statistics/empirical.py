"""The statistics as data: per-pixel numbers on a grid even in lambda, their files and their smaller forms."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

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

    def pooled(self, *, channels: bool = False) -> EmpiricalStatistics:
        """Means over all positions: one number per node, or with ``channels`` one per node and channel, (n + 1, C, 1, ...).

        Raises:
            ValueError: ``channels`` where a node has no channel axis.
        """
        if channels and self.l.ndim < 2:
            raise ValueError("channels=True needs statistics with a channel axis, (n + 1, C, ...)")
        axes = tuple(range(2 if channels else 1, self.l.ndim))
        l, s, b = (value.double().mean(axes, keepdim=channels) if axes else value for value in (self.l, self.s, self.b))
        return EmpiricalStatistics(self.lam, l, s, b, {**self.provenance, "pooled": "channels" if channels else "all"})

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

"""Features from the diffusion model itself, and whitening: what a reconstruction loses beyond contrast and brightness."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..engine import Denoiser
from ..noise import NoiseSchedule
from .levels import time_of_alpha_bar

_BLOCKS = re.compile(r"(down_blocks|up_blocks|transformer_blocks|single_transformer_blocks|blocks)\.\d+|mid_block")
_MOST_BLOCKS = 8


class NetworkFeatures:
    """What a denoiser's network sees in an image: its blocks' outputs at little noise, averaged over places.

    No labels and no second network; the noise is the same for every image, so that equal images have equal features.

    Attributes:
        blocks: names of the modules whose outputs are taken.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        denoiser: Denoiser,
        noise_schedule: NoiseSchedule,
        *,
        level: float = 0.95,
        places: int = 1,
        seed: int = 0,
    ) -> None:
        """Choose the blocks.

        Args:
            network: the ``unet`` or ``transformer``; at most eight of a transformer's blocks are used, evenly spread.
            denoiser: ``(x, t) -> x0`` that evaluates ``network`` once per sample (no classifier-free guidance).
            noise_schedule: the denoiser's.
            level: share of signal alpha_bar at which images are shown.
            places: images' activations are averaged over a grid of places x places.
            seed: of the noise.

        Raises:
            ValueError: a network without such blocks, or a level out of range.
        """
        found = [name for name, _ in network.named_modules() if _BLOCKS.fullmatch(name)]
        if not found:
            raise ValueError(f"{type(network).__name__} has no down_blocks, mid_block, up_blocks or transformer_blocks")
        if places < 1:
            raise ValueError(f"places must be at least 1, got {places}")
        spread = torch.linspace(0, len(found) - 1, min(len(found), _MOST_BLOCKS)).round().long().unique().tolist()
        self.blocks = [found[i] for i in spread]
        self._network, self._denoiser, self._places, self._seed = network, denoiser, places, seed
        self._t = time_of_alpha_bar(noise_schedule, level)
        self._alpha, self._sigma = (value.item() for value in noise_schedule.alpha_sigma(self._t))

    @torch.no_grad()
    def __call__(self, x0: Tensor) -> Tensor:
        """(B, *E) in the model's units -> (B, F) float32."""
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
                seen[name] = self._pooled(output if torch.is_tensor(output) else output[0])

            return hook

        handles = [self._network.get_submodule(name).register_forward_hook(keep(name)) for name in self.blocks]
        try:
            noise = torch.randn(x0.shape[1:], generator=torch.Generator().manual_seed(self._seed)).to(x0.device, x0.dtype)
            self._denoiser(self._alpha * x0 + self._sigma * noise, self._t)
        finally:
            for handle in handles:
                handle.remove()
        return torch.cat([seen[name] for name in self.blocks], dim=1)

    def _pooled(self, output: Tensor) -> Tensor:
        output = output.float()
        if output.ndim == 4:
            return F.adaptive_avg_pool2d(output, min(self._places, *output.shape[-2:])).flatten(1)
        return output.mean(1)  # tokens


@dataclass(frozen=True)
class Whitening:
    """An affine map after which vectors like those it was fitted on are centred and of unit covariance.

    The squared length of what it gives is Mahalanobis' distance from their mean: a direction in which hardly any vector differs
    counts as much as one in which all do. Applied to what reconstructions lose of images' features (`MinorityScorer.residuals`)
    it is a score of rarity that contrast and brightness do not drown.

    Attributes:
        mean: (F,) float64.
        matrix: (F, F) float64, symmetric; (F, rank) where only the leading directions were kept.
    """

    mean: Tensor
    matrix: Tensor

    @classmethod
    def fit(cls, vectors: Tensor, shrink: float = 1e-4, rank: int | None = None) -> Whitening:
        """Fit to (N, F) vectors; N several times F, or the vectors fitted on look commoner than others.

        Args:
            vectors: (N, *E), flattened.
            shrink: added to every eigenvalue of the covariance, as a share of their mean.
            rank: keep only so many directions, those of largest variance; None keeps all.

        Raises:
            ValueError: fewer than two vectors, or all alike; a rank outside 1..F.
        """
        flat = vectors.flatten(1).double()
        if len(flat) < 2 or not shrink > 0:
            raise ValueError(f"whitening needs at least two vectors and a positive shrink, got {len(flat)} and {shrink}")
        mean = flat.mean(0)
        values, axes = torch.linalg.eigh((flat - mean).mT @ (flat - mean) / (len(flat) - 1))
        average = values.mean().item()
        if not (math.isfinite(average) and average > 0):
            raise ValueError("the vectors are all alike or not finite: there is nothing to whiten")
        factors = (values.clamp(min=0) + shrink * average).rsqrt()
        if rank is None:
            return cls(mean, (axes * factors) @ axes.mT)
        if not 1 <= rank <= len(values):
            raise ValueError(f"rank must lie in 1..{len(values)}, the values of a vector, got {rank}")
        return cls(mean, (axes * factors)[:, -rank:])

    def __call__(self, vectors: Tensor) -> Tensor:
        """(B, *E) -> (B, F) or (B, rank) float64.

        Raises:
            ValueError: vectors of another size.
        """
        flat = vectors.flatten(1).double()
        if flat.shape[1] != len(self.mean):
            raise ValueError(f"the whitening was fitted to vectors of {len(self.mean)} values, got {flat.shape[1]}")
        return (flat - self.mean.to(flat.device)) @ self.matrix.to(flat.device)

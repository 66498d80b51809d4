r"""How rare a sample is, by one denoising step: the minority score.

$l(x_0) = E_\epsilon\, d(x_0, \hat x_0(\alpha x_0 + \sigma\epsilon))$ at one fixed noise level (Um et al. 2024,
arXiv:2301.12334, eq. 5). The denoiser is a posterior mean, so it replaces what is rare by what is common.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from ..engine import Denoiser
from ..noise import NoiseSchedule
from .distances import Distance, distance_named
from .features import Whitening
from .levels import TARGET_SNR, alpha_bar_of_snr, time_of_alpha_bar, top_eigenvalue


class MinorityScorer:
    r"""Scores samples: higher is rarer.

    What "rare" means is decided by the noise level. Where the signal-to-noise ratio of the leading principal direction,
    $\mathrm{SNR}_1 = \bar\alpha\lambda_1/(1-\bar\alpha)$, is 0.1 to 0.5, the score finds modes of low weight
    (``target="mode"``); where it is far above 1, it tells how typical a sample is within its mode (``target="typicality"``)
    and is blind to the weights of modes. In few dimensions (about ten or less) the first regime does not exist.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        noise_schedule: NoiseSchedule,
        level: str | float = "auto",
        draws: int = 16,
        distance: str | Distance = "l2",
        *,
        target: str = "mode",
        clip: float | None = None,
    ) -> None:
        """Fix what is measured.

        Args:
            denoiser: ``(x, t) -> x0``; conditioning bound.
            noise_schedule: the denoiser's.
            level: the share of signal alpha_bar in (0, 1), or "auto": the level with the target's signal-to-noise ratio for
                the scored batch, or for the data given to `calibrated`. 0.024 is the published value for images of 64 pixels
                and more.
            draws: noises per sample, each one network evaluation.
            distance: "l2", "l1", "lpips", or a function of two batches that gives (B,).
            target: "mode" (SNR_1 = 0.4) or "typicality" (SNR_1 = 30); used by "auto".
            clip: clamp reconstructions to [-clip, clip], as pixel models are sampled.

        Raises:
            ValueError: a value outside its range, naming it.
            FileNotFoundError: LPIPS weights that are not there.
        """
        if target not in TARGET_SNR:
            raise ValueError(f"unknown target {target!r}; known: {', '.join(TARGET_SNR)}")
        if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
            raise ValueError(f"draws must be a whole number of at least 1, got {draws!r}")
        if clip is not None and not clip > 0:
            raise ValueError(f"clip must be positive, got {clip}")
        if isinstance(level, str):
            if level != "auto":
                raise ValueError(f"level must be 'auto' or alpha_bar in (0, 1), got {level!r}")
        else:
            time_of_alpha_bar(noise_schedule, float(level))
        self.denoiser, self.noise_schedule, self.draws, self.clip = denoiser, noise_schedule, draws, clip
        self.level: str | float = level if isinstance(level, str) else float(level)
        self.distance, self.target = distance_named(distance), target
        self.whitening: Whitening | None = None

    @property
    def settings(self) -> dict[str, str | float | int | None]:
        """What decides the numbers besides model and data, JSON-native."""
        return {
            "level": self.level,
            "draws": self.draws,
            "distance": getattr(self.distance, "__name__", type(self.distance).__name__),
            "target": self.target if self.level == "auto" else None,
            "clip": self.clip,
        } | ({} if self.whitening is None else {"whitened": True})

    def level_for(self, x0: Tensor) -> float:
        """The share of signal alpha_bar that ``x0`` (B, *E) is scored at.

        Raises:
            ValueError: level "auto" for a single sample or samples that are all alike.
        """
        if not isinstance(self.level, str):
            return self.level
        return alpha_bar_of_snr(TARGET_SNR[self.target], top_eigenvalue(x0))

    def calibrated(self, x0: Tensor) -> MinorityScorer:
        """The same scorer with its level fixed for data like ``x0`` (B, *E), so that batches are comparable."""
        scorer = copy.copy(self)
        scorer.level = self.level_for(x0)
        return scorer

    def whitened(self, whitening: Whitening) -> MinorityScorer:
        """The same scorer with what reconstruction loses whitened: its squared length is then the score.

        Fit the whitening to `residuals` of several times as many samples as they have values. It is of use with a distance of
        features (`NetworkFeatures`), of which a few leading directions would otherwise decide the score.
        """
        scorer = copy.copy(self)
        scorer.whitening = whitening
        return scorer

    @torch.no_grad()
    def __call__(self, x0: Tensor, generator: torch.Generator | None = None, class_labels: Tensor | None = None) -> Tensor:
        """Score a batch.

        Args:
            x0: (B, *E) floating point, in the model's units (images in [-1, 1], scaled latents).
            generator: source of the noise, on any device.
            class_labels: (B,), to score within classes; the denoiser is then called ``denoiser(x, t, class_labels)``.

        Returns:
            (B,) mean distance over the draws, in x0's dtype but at least float32.

        Raises:
            ValueError: no floating-point batch; level "auto" for less than two samples.
        """
        if self.whitening is not None:
            return self.residuals(x0, generator, class_labels).square().sum(1)
        x0, total = _widened(x0), None
        for reconstruction in self._reconstructions(x0, generator, class_labels):
            distance = self.distance(x0, reconstruction)
            if distance.shape != (len(x0),):
                raise ValueError(f"the distance must give shape ({len(x0)},), got {tuple(distance.shape)}")
            total = distance if total is None else total + distance
        assert total is not None
        return total / self.draws

    @torch.no_grad()
    def residuals(self, x0: Tensor, generator: torch.Generator | None = None, class_labels: Tensor | None = None) -> Tensor:
        """What reconstruction loses, the mean over the draws: (B, *E) of ``x0 - x0hat``, or of their features (B, F).

        The latter where the distance is one of features (it has ``features``); whitened in a `whitened` scorer. Arguments as
        for a score.
        """
        seen = getattr(self.distance, "features", lambda x: x)
        x0 = _widened(x0)
        kept = sum(seen(reconstruction) for reconstruction in self._reconstructions(x0, generator, class_labels))
        lost = seen(x0) - kept / self.draws
        return lost if self.whitening is None else self.whitening(lost).to(lost.dtype)

    def _reconstructions(self, x0: Tensor, generator: torch.Generator | None, class_labels: Tensor | None):
        t = time_of_alpha_bar(self.noise_schedule, self.level_for(x0))
        alpha, sigma = (value.item() for value in self.noise_schedule.alpha_sigma(t))
        device = x0.device if generator is None else generator.device
        known = () if class_labels is None else (class_labels,)
        for _ in range(self.draws):
            noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype, device=device).to(x0.device)
            reconstruction = self.denoiser(alpha * x0 + sigma * noise, t, *known).to(x0.dtype)
            if self.clip is not None:
                reconstruction = reconstruction.clamp(-self.clip, self.clip)
            yield reconstruction


def _widened(x0: Tensor) -> Tensor:
    """The batch in at least float32."""
    if not torch.is_tensor(x0) or not x0.is_floating_point() or x0.ndim < 2:
        raise ValueError("x0 must be a floating-point tensor (B, *E)")
    return x0.to(torch.promote_types(x0.dtype, torch.float32))

r"""Laws whose denoiser $E[x_0 | x_t]$ is known in closed form: what every claim is tested on first."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..engine import Denoiser
from ..noise import NoiseSchedule


class GaussianMixture:
    r"""$\sum_k w_k N(\mu_k, s_k^2 I)$, or with full covariances; K = 1 is a Gaussian.

    Noised to time t it is again a mixture, $\sum_k w_k N(\alpha\mu_k, \alpha^2\Sigma_k + \sigma^2 I)$, so score, denoiser
    and density are exact. Everything is float64 inside.
    """

    def __init__(
        self,
        means: Tensor,
        stds: Tensor | None = None,
        weights: Tensor | None = None,
        *,
        covariances: Tensor | None = None,
    ) -> None:
        """Define the law.

        Args:
            means: (K, D).
            stds: (K,) standard deviations >= 0 of isotropic components.
            weights: (K,) > 0, normalised here; equal when None.
            covariances: (K, D, D) symmetric positive semi-definite, instead of ``stds``.

        Raises:
            ValueError: shapes that do not fit, both or neither of ``stds`` and ``covariances``, or negative values.
        """
        self.means = torch.as_tensor(means, dtype=torch.float64)
        if self.means.ndim != 2:
            raise ValueError(f"means must have shape (K, D), got {tuple(self.means.shape)}")
        k, d = self.means.shape
        if (stds is None) == (covariances is None):
            raise ValueError("give either stds (K,) or covariances (K, D, D)")
        weights = torch.full((k,), 1.0) if weights is None else torch.as_tensor(weights)
        self.weights = weights.to(self.means)
        if self.weights.shape != (k,) or not bool((self.weights > 0).all()):
            raise ValueError(f"weights must be {k} positive numbers, got shape {tuple(self.weights.shape)}")
        self.weights = self.weights / self.weights.sum()
        # Each component in its own eigenbasis: variances (K, D), vectors (K, D, D) or None when isotropic.
        self.vectors: Tensor | None = None
        if stds is not None:
            stds = torch.as_tensor(stds).to(self.means)
            if stds.shape != (k,) or not bool((stds >= 0).all()):
                raise ValueError(f"stds must be {k} numbers >= 0, got shape {tuple(stds.shape)}")
            self.variances = stds.square()[:, None]
        else:
            covariances = torch.as_tensor(covariances).to(self.means)
            if covariances.shape != (k, d, d):
                raise ValueError(f"covariances must have shape {(k, d, d)}, got {tuple(covariances.shape)}")
            values, self.vectors = torch.linalg.eigh((covariances + covariances.mT) / 2)
            if bool((values < -1e-9 * values.abs().max()).any()):
                raise ValueError("covariances must be positive semi-definite")
            self.variances = values.clamp(min=0.0)

    @property
    def mean(self) -> Tensor:
        """(D,) the law's mean."""
        return self.weights @ self.means

    @property
    def covariance(self) -> Tensor:
        """(D, D) the law's covariance."""
        centred = self.means - self.mean
        between = (self.weights[:, None] * centred).mT @ centred
        if self.vectors is None:
            within = (self.weights @ self.variances).squeeze() * torch.eye(self.means.shape[1]).to(self.means)
        else:
            within = torch.einsum("k,kij,kj,klj->il", self.weights, self.vectors, self.variances, self.vectors)
        return between + within

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """(n, D) independent draws, float64."""
        component = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.means.shape[1], dtype=torch.float64, generator=generator)
        noise = noise * self.variances[component].sqrt()
        if self.vectors is not None:
            noise = torch.einsum("nij,nj->ni", self.vectors[component], noise)
        return self.means[component] + noise

    def log_prob(self, x: Tensor, alpha: float | Tensor = 1.0, sigma: float | Tensor = 0.0) -> Tensor:
        """Log-density (B,) at ``x`` (B, *E) of the law noised to (alpha, sigma); the law itself by default."""
        return self._posterior(x, alpha, sigma)[0].logsumexp(-1)

    def score(self, x: Tensor, alpha: float | Tensor, sigma: float | Tensor) -> Tensor:
        """Gradient of `log_prob` in x, (B, *E)."""
        log_weights, _, whitened = self._posterior(x, alpha, sigma)
        return -torch.einsum("bk,bkd->bd", log_weights.softmax(-1), whitened).reshape(x.shape).to(x.dtype)

    def denoiser(self, noise_schedule: NoiseSchedule) -> Denoiser:
        """The exact posterior mean ``(x, t) -> E[x_0 | x_t = x]``; x is (B, *E) with prod(E) = D."""

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            alpha, sigma = noise_schedule.alpha_sigma(t)
            log_weights, shift, _ = self._posterior(x, alpha, sigma)
            mean = torch.einsum("bk,bkd->bd", log_weights.softmax(-1), self.means + alpha * shift)
            return mean.reshape(x.shape).to(x.dtype)

        return denoise

    def _posterior(self, x: Tensor, alpha: float | Tensor, sigma: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unnormalised log-weights (B, K); Sigma C^-1 d and C^-1 d (B, K, D), d = x - alpha mu, C the noised covariance."""
        flat = x.reshape(len(x), -1).to(torch.float64)
        if flat.shape[1] != self.means.shape[1]:
            raise ValueError(f"x has {flat.shape[1]} values per sample, the mixture {self.means.shape[1]}")
        centred = flat[:, None] - alpha * self.means
        variances = alpha**2 * self.variances + sigma**2  # (K, D) or (K, 1)
        if self.vectors is None:
            whitened = centred / variances
            shift = whitened * self.variances
            log_det = flat.shape[1] * variances.log().sum(-1)
        else:
            inner = torch.einsum("kij,bki->bkj", self.vectors, centred) / variances
            whitened = torch.einsum("kij,bkj->bki", self.vectors, inner)
            shift = torch.einsum("kij,bkj->bki", self.vectors, inner * self.variances)
            log_det = variances.log().sum(-1)
        distance = (centred * whitened).sum(-1)
        log_norm = flat.shape[1] * math.log(2 * math.pi)
        return self.weights.log() - 0.5 * (distance + log_det + log_norm), shift, whitened


class EmpiricalDataset:
    r"""The law that puts equal mass on each of N points: $E[x_0 | x_t]$ is a softmax-weighted mean of the data."""

    def __init__(self, x: Tensor, *, chunk: int = 4096) -> None:
        """Keep the data.

        Args:
            x: (N, *E) floating point.
            chunk: data points handled at once; bounds memory at (B, chunk).

        Raises:
            ValueError: not a floating-point tensor with at least one point.
        """
        if not x.is_floating_point() or x.ndim < 2 or len(x) == 0:
            raise ValueError(f"the data must be a floating-point tensor (N, *E) with N >= 1, got {tuple(x.shape)} {x.dtype}")
        self.shape, self.chunk = x.shape[1:], chunk
        self.flat = x.reshape(len(x), -1)
        self.norms = self.flat.double().square().sum(-1)

    def denoiser(self, noise_schedule: NoiseSchedule) -> Denoiser:
        """The exact posterior mean; arithmetic in the data's or x's dtype, whichever is wider."""

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            alpha, sigma = noise_schedule.alpha_sigma(t)
            dtype = torch.promote_types(x.dtype, self.flat.dtype)
            flat = x.reshape(len(x), -1).to(dtype)
            inner, outer = (alpha / sigma**2).item(), (0.5 * alpha**2 / sigma**2).item()
            # log weight of point i up to a constant: (alpha x.y_i - alpha^2 |y_i|^2 / 2) / sigma^2, streamed in chunks
            top = flat.new_full((len(flat), 1), -math.inf)
            total, mean = torch.zeros_like(top), torch.zeros_like(flat)
            for start in range(0, len(self.flat), self.chunk):
                data = self.flat[start : start + self.chunk].to(flat)
                logits = inner * (flat @ data.mT) - outer * self.norms[start : start + self.chunk].to(flat)
                peak = torch.maximum(top, logits.amax(-1, keepdim=True))
                weights, rescale = torch.exp(logits - peak), torch.exp(top - peak)
                total = total * rescale + weights.sum(-1, keepdim=True)
                mean = mean * rescale + weights @ data
                top = peak
            return (mean / total).reshape(x.shape).to(x.dtype)

        return denoise

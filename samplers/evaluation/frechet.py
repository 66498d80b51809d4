"""Frechet distance between Gaussians: exact, symmetric, in float64, with the reference's square root kept."""

from __future__ import annotations

import torch
from torch import Tensor

from .moments import FeatureMoments
from .symmetric import add_lower_

# Covariances that others summed in float32 have eigenvalues this far below zero, relative to the largest.
NEGATIVE = 1e-5


def frechet_distance(mu1: Tensor, sigma1: Tensor, mu2: Tensor, sigma2: Tensor) -> float:
    r"""Squared Frechet (2-Wasserstein) distance between two Gaussians.

    $|\mu_1-\mu_2|^2 + \mathrm{tr}(\Sigma_1+\Sigma_2) - 2\,\mathrm{tr}(\Sigma_1^{1/2}\Sigma_2\Sigma_1^{1/2})^{1/2}$
    (Dowson & Landau 1982). The symmetric form needs no square root of a matrix that is not symmetric: singular covariances
    are no special case, and nothing is ever imaginary.

    Args:
        mu1: (D,) mean; arrays and tensors of any floating dtype are computed with in float64.
        sigma1: (D, D) covariance.
        mu2: (D,) mean.
        sigma2: (D, D) covariance.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, or a matrix that is no covariance.
    """
    return FrechetReference(mu1, sigma1).distance(mu2, sigma2)


def gaussian_wasserstein(mu1: Tensor, sigma1: Tensor, mu2: Tensor, sigma2: Tensor) -> float:
    """Exact 2-Wasserstein distance between two Gaussians: the square root of `frechet_distance`; arguments as there."""
    return frechet_distance(mu1, sigma1, mu2, sigma2) ** 0.5


class FrechetReference:
    """One side of many Frechet distances: its matrix square root is computed once.

    Args:
        mu: (D,) mean.
        sigma: (D, D) covariance.
        unit_variance: give distances in units of the reference's total variance tr(sigma), which makes features without a
            natural scale readable. FID does not.

    Raises:
        ValueError: as in `frechet_distance`.
    """

    def __init__(self, mu: Tensor, sigma: Tensor, *, unit_variance: bool = False) -> None:
        """Check the reference and factorise its covariance."""
        self.mu, self.sigma = _gaussian(mu, sigma)
        values, vectors = torch.linalg.eigh(self.sigma)
        floor = _floor(values)
        if values[0] < -NEGATIVE * values[-1]:
            raise ValueError(f"not a covariance: its eigenvalues go from {values[0].item():.3g} to {values[-1].item():.3g}")
        keep = values > floor
        # R with R R^T = sigma; directions without variance drop out.
        self.root = vectors[:, keep] * values[keep].sqrt()
        self._trace = values[keep].sum()
        self.unit = self._trace.item() if unit_variance else 1.0
        if self.unit <= 0:
            raise ValueError("the reference features do not vary, so distances have no unit")

    @classmethod
    def from_moments(cls, moments: FeatureMoments, *, unit_variance: bool = False) -> FrechetReference:
        """The reference with these moments."""
        return cls(moments.mean, moments.cov, unit_variance=unit_variance)

    @classmethod
    def from_features(cls, features: Tensor, *, unit_variance: bool = False) -> FrechetReference:
        """The reference with the moments of these features (N, D)."""
        moments = FeatureMoments(features.shape[-1], device=features.device)
        moments.update(features)
        return cls.from_moments(moments, unit_variance=unit_variance)

    def distance(self, mu: Tensor, sigma: Tensor) -> float:
        """Squared Frechet distance to another Gaussian.

        Raises:
            ValueError: as in `frechet_distance`.
        """
        mu, sigma = _gaussian(mu, sigma)
        self._fits(mu)
        mu, sigma = mu.to(self.mu.device), sigma.to(self.mu.device)
        values = _eigenvalues(sigma @ self.root, self.root)
        smallest = values.min().item() if len(values) else 0.0
        # A covariance makes the product positive semi-definite up to rounding, which scales with both matrices.
        scale = (self.sigma.diagonal().abs().max() * sigma.diagonal().abs().max()).item()
        if smallest < -NEGATIVE * max(scale, values.max().item() if len(values) else 0.0):
            raise ValueError(f"not a covariance: the product of the covariances has an eigenvalue of {smallest:.3g}")
        return self._value(mu, sigma.trace(), _root_sum(values))

    def distance_to_moments(self, moments: FeatureMoments) -> float:
        """Squared Frechet distance to the Gaussian with these moments."""
        return self.distance(moments.mean, moments.cov)

    def distance_to_features(self, features: Tensor) -> float:
        """Squared Frechet distance to the Gaussian with the moments of these features.

        With fewer vectors than features the (n, n) Gram matrix of the rotated vectors has the same non-zero eigenvalues as
        the (D, D) product, so a candidate of a search costs O(n^2 D) and not O(D^3).

        Args:
            features: (n, D), n at least 2.

        Raises:
            ValueError: shapes that do not fit, or values that are not finite.
        """
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"features must be (n, D) with n of at least 2, not {tuple(features.shape)}")
        n, rank = len(features), self.root.shape[1]
        x = features.to(self.mu.device, torch.float64)
        mu = x.mean(0)
        self._fits(mu)
        if not bool(mu.isfinite().all()):
            raise ValueError("features are not finite")
        x = x - mu
        trace = x.square().sum() / (n - 1)
        rotated = x @ self.root / (n - 1) ** 0.5
        thin = rotated.mT if n <= rank else rotated
        return self._value(mu, trace, _root_sum(_eigenvalues(thin, thin)))

    def _fits(self, mu: Tensor) -> None:
        if mu.shape != self.mu.shape:
            raise ValueError(f"the reference has {len(self.mu)} features, the other side {len(mu)}")

    def _value(self, mu: Tensor, trace: Tensor, root_sum: Tensor) -> float:
        value = (mu - self.mu).square().sum() + self._trace + trace - 2 * root_sum
        # The exact value is not negative; what rounding leaves below zero is of the order of its error, and is zero.
        return max(value.item(), 0.0) / self.unit


def _gaussian(mu: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    mu, sigma = torch.as_tensor(mu).to(torch.float64), torch.as_tensor(sigma).to(torch.float64)
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise ValueError(f"a mean and a covariance must be (D,) and (D, D), not {tuple(mu.shape)} and {tuple(sigma.shape)}")
    if not bool(mu.isfinite().all() & sigma.isfinite().all()):
        raise ValueError("a mean or a covariance is not finite")
    asymmetry, size = (sigma - sigma.mT).abs().max(), sigma.abs().max()
    if asymmetry > 1e-4 * size:
        raise ValueError(f"not a covariance: it is not symmetric (by {(asymmetry / size).item():.1e} of its largest entry)")
    return mu, (sigma + sigma.mT) / 2


def _eigenvalues(a: Tensor, b: Tensor) -> Tensor:
    """Eigenvalues of a^T b, which is symmetric: only its lower triangle is computed and read."""
    product = a.new_zeros(a.shape[1], a.shape[1])
    return torch.linalg.eigvalsh(add_lower_(product, b, a), UPLO="L")


def _floor(values: Tensor) -> Tensor:
    """Below this, an eigenvalue of a symmetric matrix cannot be told from zero."""
    return torch.finfo(values.dtype).eps * len(values) * values.abs().max()


def _root_sum(values: Tensor) -> Tensor:
    """Sum of the square roots of the eigenvalues that are not rounding."""
    if not len(values):
        return values.sum()
    return torch.where(values > _floor(values), values, 0).sqrt().sum()

"""Models and measures of `feynman_kac.py`: laws whose annealed version is known exactly, and distances to it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment, minimize
from torch import Tensor

from samplers.denoisers import GaussianMixture

Gen = torch.Generator


# ---- mixture of 40 Gaussians in the plane --------------------------------------------------------------------------------


@dataclass
class Grid:
    """A density on a square grid: exact draws and exact bin masses of q^beta."""

    edge: float
    mass: Tensor
    log_z: float

    @staticmethod
    def of(model: GaussianMixture, beta: float, sigma: float, edge: float = 48.0, cells: int = 1200) -> Grid:
        axis = (torch.arange(cells, dtype=torch.float64) + 0.5) * (2 * edge / cells) - edge
        points = torch.cartesian_prod(axis, axis)
        log_p = torch.cat([beta * model.log_prob(part, 1.0, sigma) for part in points.split(100_000)])
        log_z = float(log_p.logsumexp(0) + 2 * math.log(2 * edge / cells))
        return Grid(edge, log_p.softmax(0).reshape(cells, cells), log_z)

    def sample(self, n: int, generator: Gen) -> Tensor:
        cells = len(self.mass)
        # multinomial takes at most 2^24 categories
        chosen = torch.multinomial(self.mass.flatten(), n, replacement=True, generator=generator)
        corner = torch.stack([chosen // cells, chosen % cells], -1).double()
        return (corner + torch.rand(n, 2, generator=generator, dtype=torch.float64)) * (2 * self.edge / cells) - self.edge

    def tv(self, x: Tensor, bins: int = 50) -> float:
        step = len(self.mass) // bins
        truth = self.mass.reshape(bins, step, bins, step).sum((1, 3))
        place = ((x + self.edge) / (2 * self.edge) * bins).floor().long()
        inside = ((place >= 0) & (place < bins)).all(-1)
        flat = place[inside] @ torch.tensor([bins, 1])
        found = torch.zeros(bins * bins, dtype=torch.float64).scatter_add(
            0, flat, torch.full((len(flat),), 1 / len(x)).double()
        )
        return float(0.5 * ((found - truth.flatten()).abs().sum() + (~inside).double().mean()))


def forty_gaussians() -> GaussianMixture:
    """40 equal components, means uniform in [-40, 40]^2, standard deviation 1.3."""
    means = (torch.rand(40, 2, generator=Gen().manual_seed(0), dtype=torch.float64) - 0.5) * 80
    return GaussianMixture(means, torch.full((40,), 1.3))


# ---- Lennard-Jones cluster ------------------------------------------------------------------------------------------------

ATOMS = 13
UPPER = np.triu_indices(ATOMS, 1)


def lj_energy(x: Tensor) -> Tensor:
    """Lennard-Jones energy (B,) of clusters (B, 39), in units of epsilon and sigma."""
    atoms = x.reshape(len(x), ATOMS, 3)
    i, j = (torch.from_numpy(u) for u in UPPER)
    inverse = (atoms[:, i] - atoms[:, j]).square().sum(-1).pow(-3)
    return (4 * (inverse.square() - inverse)).sum(-1)


def _value_and_gradient(x: np.ndarray) -> tuple[float, np.ndarray]:
    point = torch.from_numpy(x)[None].requires_grad_()
    energy = lj_energy(point).sum()
    return float(energy.detach()), torch.autograd.grad(energy, point)[0][0].numpy()


@dataclass
class Cluster:
    """The harmonic superposition model of the 13-atom Lennard-Jones cluster at a temperature."""

    model: GaussianMixture
    energies: Tensor  # of the minima

    def annealed(self, beta: float) -> tuple[GaussianMixture, float]:
        """The law q^beta and log of its integral, for components that do not overlap."""
        m = self.model
        assert m.vectors is not None
        d = m.means.shape[1]
        log_det = m.variances.log().sum(-1)
        log_part = beta * m.weights.log() + 0.5 * (1 - beta) * (d * math.log(2 * math.pi) + log_det) - 0.5 * d * math.log(beta)
        covariances = torch.einsum("kij,kj,klj->kil", m.vectors, m.variances / beta, m.vectors)
        return GaussianMixture(m.means, covariances=covariances, weights=log_part.softmax(0)), float(log_part.logsumexp(0))


def lennard_jones(temperature: float, minima: int = 10, tries: int = 250) -> Cluster:
    """Find the lowest minima by quenching random and perturbed clusters, and put a Gaussian of the Hessian on each.

    Each minimum counts once, in one orientation; translations and rotations are held by a Gaussian of variance 0.01.
    """
    rng = np.random.default_rng(0)
    found: dict[float, np.ndarray] = {}
    best: np.ndarray | None = None
    for attempt in range(tries):
        start = rng.normal(size=39) * 1.0 if best is None or attempt % 2 else best + rng.normal(size=39) * 0.35
        done = minimize(_value_and_gradient, start, jac=True, method="L-BFGS-B", options={"maxiter": 400, "gtol": 1e-7})
        energy = round(float(done.fun), 4)
        if done.success and energy < -30 and energy not in found:
            found[energy] = done.x
            best = found[min(found)]
    lowest = sorted(found)[:minima]
    means, covariances, log_weights = [], [], []
    for energy in lowest:
        x = torch.from_numpy(found[energy]).reshape(1, ATOMS, 3)
        x = (x - x.mean(1, keepdim=True)).reshape(-1)
        hessian = torch.autograd.functional.hessian(lambda p: lj_energy(p[None]).sum(), x)
        values, vectors = torch.linalg.eigh(hessian)
        free = values < 1e-3
        variances = torch.where(free, 0.01, temperature / values.clamp(min=1e-3))
        means.append(x)
        covariances.append((vectors * variances) @ vectors.mT)
        log_weights.append(-energy / temperature + 0.5 * variances.log().sum())
    weights = torch.stack(log_weights).softmax(0)
    model = GaussianMixture(torch.stack(means), covariances=torch.stack(covariances), weights=weights)
    return Cluster(model, torch.tensor(lowest))


# ---- distances ------------------------------------------------------------------------------------------------------------


def wasserstein(x: Tensor, y: Tensor) -> tuple[float, float]:
    """W1 and W2 between two equally large samples (n, D), by optimal assignment."""
    cost = torch.cdist(x, y)
    rows, columns = linear_sum_assignment(cost.numpy())
    first = float(cost[rows, columns].mean())
    rows, columns = linear_sum_assignment(cost.square().numpy())
    return first, math.sqrt(float(cost.square()[rows, columns].mean()))


def wasserstein_1d(x: Tensor, y: Tensor) -> tuple[float, float]:
    """W1 and W2 between two equally large samples of numbers (n,)."""
    gap = x.sort().values - y.sort().values
    return float(gap.abs().mean()), math.sqrt(float(gap.square().mean()))


def mmd(x: Tensor, y: Tensor, scale: float) -> float:
    """Square root of the unbiased squared maximum mean discrepancy with kernel exp(-|x - y| / scale), 0 where negative."""
    n, m = len(x), len(y)
    within_x = (torch.exp(-torch.cdist(x, x) / scale).sum() - n) / (n * (n - 1))
    within_y = (torch.exp(-torch.cdist(y, y) / scale).sum() - m) / (m * (m - 1))
    return math.sqrt(max(0.0, float(within_x + within_y - 2 * torch.exp(-torch.cdist(x, y) / scale).mean())))

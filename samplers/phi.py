r"""The few functions behind the coefficients, over Python floats and 0-d tensors alike: phi, derivative weights, quadrature."""

from __future__ import annotations

import math

import torch

from .parametrization import Scalar


def gauss_legendre(n: int) -> list[tuple[float, float]]:
    """Nodes and weights on [0, 1] by Golub & Welsch (1969): eigenvalues of the Jacobi matrix."""
    k = torch.arange(1, n, dtype=torch.float64)
    off = k / (4 * k * k - 1).sqrt()
    values, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return list(zip(((values + 1) / 2).tolist(), vectors[0].square().tolist(), strict=True))


GAUSS_LEGENDRE = gauss_legendre(12)


def exp(z: Scalar) -> Scalar:
    """e^z; infinite where a float would overflow."""
    if torch.is_tensor(z):
        return torch.exp(z)
    return math.exp(z) if z < 700 else math.inf


def log(z: Scalar) -> Scalar:
    """Natural logarithm."""
    return torch.log(z) if torch.is_tensor(z) else math.log(z)


def is_zero(value: Scalar) -> bool:
    """Whether a level is exactly zero."""
    return bool(value == 0)


_INVERSE_FACTORIALS = [1.0 / math.factorial(n) for n in range(32)]


def phi(k: int, z: Scalar) -> Scalar:
    r"""$\varphi_k(z) = \sum_{j \ge 0} z^j / (j + k)!$: $\varphi_1 = (e^z - 1)/z$, $\varphi_{k+1} = (\varphi_k - 1/k!)/z$."""
    if abs(float(z.detach()) if torch.is_tensor(z) else z) < 1.0:
        total: Scalar = 0.0
        for j in range(18, -1, -1):
            total = total * z + _INVERSE_FACTORIALS[j + k]
        return total
    value = (exp(z) - 1.0) / z
    for j in range(1, k):
        value = (value - _INVERSE_FACTORIALS[j]) / z
    return value


def psi(k: int, z: Scalar) -> Scalar:
    r"""$\psi_k(z) = e^z \varphi_k(-z)$."""
    return exp(z) * phi(k, -z)


def derivative_weights(delta: list[Scalar], k: int) -> list[Scalar]:
    r"""Weights $w_j$ with $D^{(k)} \approx \sum_j w_j (M_j - M_s)$ for nodes at ``delta`` from s, exact on polynomials.

    They solve $\sum_j w_j \delta_j^i / i! = 1[i = k]$, i = 1..m: the k-th derivative at s of the polynomial through s
    and the nodes, read off the Lagrange basis.
    """
    if len(delta) == 1:
        return [1.0 / delta[0]]
    weights = []
    for j, at in enumerate(delta):
        coefficients: list[Scalar] = [1.0]  # of the product over the other nodes, constant term first
        scale: Scalar = at
        for i, other in enumerate(delta):
            if i != j:
                shifted = [0.0, *coefficients]
                coefficients = [a - other * b for a, b in zip(shifted, [*coefficients, 0.0], strict=True)]
                scale = scale * (at - other)
        weights.append(math.factorial(k) * coefficients[k - 1] / scale)
    return weights

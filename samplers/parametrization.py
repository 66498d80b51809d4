r"""What a network predicts, and the one conversion from it to $x_0$.

With $x_t = \alpha x_0 + \sigma\epsilon$ every parametrization in use is affine: $x_0 = c_x x_t + c_o\,\mathrm{output}$.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = "epsilon"
SAMPLE = "sample"
V_PREDICTION = "v_prediction"
FLOW_PREDICTION = "flow_prediction"
REVERSED_FLOW_PREDICTION = "reversed_flow_prediction"
PARAMETRIZATIONS = (EPSILON, SAMPLE, V_PREDICTION, FLOW_PREDICTION, REVERSED_FLOW_PREDICTION)

Scalar = float | Tensor


def check_parametrization(kind: str) -> str:
    """``kind`` itself when it is known.

    Raises:
        ValueError: it is not; the message lists the known ones.
    """
    if kind not in PARAMETRIZATIONS:
        raise ValueError(f"unknown prediction type {kind!r}; known: {', '.join(PARAMETRIZATIONS)}")
    return kind


def x0_coefficients(kind: str, alpha: Scalar, sigma: Scalar, sigma_data: float | None = None) -> tuple[Scalar, Scalar]:
    r"""$(c_x, c_o)$ with $x_0 = c_x x_t + c_o\,\mathrm{output}$.

    epsilon: output $= \epsilon$. sample: output $= x_0$. v_prediction: output $= \alpha\epsilon - \sigma x_0$ (Salimans & Ho
    2022, arXiv:2202.00512). flow_prediction: output $= \epsilon - x_0$. reversed_flow_prediction: output $= x_0 - \epsilon$
    (Mochi). These also hold off their usual schedules ($\alpha^2 + \sigma^2 = 1$, $\alpha + \sigma = 1$).

    Args:
        kind: one of `PARAMETRIZATIONS`.
        alpha: signal level at the evaluation.
        sigma: noise level at the evaluation.
        sigma_data: when given, the network is preconditioned as in EDM (Karras et al. 2022, arXiv:2206.00364, table 1) with
            this data scale and ``alpha`` must be 1; "v_prediction" then means the opposite sign of the output.

    Raises:
        ValueError: epsilon prediction where ``alpha`` is 0: such an output says nothing about x0.
    """
    check_parametrization(kind)
    if sigma_data is not None:
        scale = sigma**2 + sigma_data**2
        c_out = sigma * sigma_data / scale**0.5
        return sigma_data**2 / scale, -c_out if kind == V_PREDICTION else c_out
    if kind == EPSILON:
        if not torch.is_tensor(alpha) and alpha == 0:
            raise ValueError("an epsilon-predicting network cannot be evaluated at alpha = 0; start the times below it")
        return 1 / alpha, -sigma / alpha
    if kind == SAMPLE:
        return 0.0, 1.0
    if kind == V_PREDICTION:
        norm = alpha**2 + sigma**2
        return alpha / norm, -sigma / norm
    norm = alpha + sigma
    return 1 / norm, (sigma if kind == REVERSED_FLOW_PREDICTION else -sigma) / norm


def to_x0(output: Tensor, x: Tensor, alpha: Scalar, sigma: Scalar, kind: str, sigma_data: float | None = None) -> Tensor:
    """The x0-prediction in a network's output.

    Args:
        output: (B, *E), what the network returned.
        x: (B, *E), the state it was evaluated at.
        alpha: signal level there.
        sigma: noise level there.
        kind: one of `PARAMETRIZATIONS`.
        sigma_data: see `x0_coefficients`.

    Returns:
        (B, *E) in the dtype of ``x``.
    """
    if kind == SAMPLE and sigma_data is None:
        return output.to(x.dtype)
    c_x, c_o = x0_coefficients(kind, alpha, sigma, sigma_data)
    return weighted_sum([(c_x, x), (c_o, output.to(x.dtype))])


def weighted_sum(terms: list[tuple[Scalar, Tensor]]) -> Tensor:
    """``sum(c * x)`` over at least one term, with as few passes over memory as eager torch allows.

    Float coefficients use the fused ``add(alpha=)``; tensor coefficients (0-d, or broadcasting to the state) stay
    differentiable and leave the state's dtype alone when they are 0-d.
    """
    scale, x = terms[0]
    total = x * scale
    for scale, x in terms[1:]:
        total = total + x * scale if torch.is_tensor(scale) else total.add_(x, alpha=scale)
    return total

r"""At which noise level to ask how rare a sample is: the signal-to-noise rule of the top principal direction.

The level is named by $\bar\alpha = \alpha^2 / (\alpha^2 + \sigma^2)$, which means the same in every family of noise schedules;
a fraction of the training steps does not.
"""

from __future__ import annotations

import math

import torch
from scipy.sparse.linalg import svds
from torch import Tensor

from ..noise import NoiseSchedule

TARGET_SNR = {"mode": 0.4, "typicality": 30.0}
_EXACT_UP_TO = 2048  # sizes of covariance or Gram matrices that are decomposed directly


def top_eigenvalue(x0: Tensor) -> float:
    """Largest eigenvalue of the data's covariance, in float64.

    Args:
        x0: (B, *E), at least two samples.

    Raises:
        ValueError: fewer than two samples, or all alike.
    """
    if x0.ndim < 2 or len(x0) < 2:
        raise ValueError(f"the top covariance eigenvalue needs at least two samples (B, *E), got shape {tuple(x0.shape)}")
    flat = x0.detach().reshape(len(x0), -1).to("cpu", torch.float64)
    flat = flat - flat.mean(0)
    if min(flat.shape) <= _EXACT_UP_TO:
        gram = flat.mT @ flat if flat.shape[1] <= flat.shape[0] else flat @ flat.mT
        value = torch.linalg.eigvalsh(gram)[-1].item() / (len(flat) - 1)
    else:
        # Lanczos, started from the longest sample so that nothing is random.
        start = flat[flat.norm(dim=1).argmax()] if flat.shape[1] <= flat.shape[0] else flat.norm(dim=1)
        value = svds(flat.numpy(), k=1, v0=start.numpy(), return_singular_vectors=False)[0] ** 2 / (len(flat) - 1)
    if not value > 0:
        raise ValueError("all samples are alike: their covariance is zero, and nothing among them is rare")
    return value


def alpha_bar_of_snr(snr: float, top_variance: float) -> float:
    r"""The level $\bar\alpha$ where $\mathrm{SNR}_1 = \bar\alpha\lambda_1 / (1 - \bar\alpha)$ has the given value."""
    if not (snr > 0 and top_variance > 0):
        raise ValueError(f"signal-to-noise ratio and top variance must be positive, got {snr} and {top_variance}")
    return snr / (snr + top_variance)


def alpha_bar(alpha: float, sigma: float) -> float:
    r"""$\alpha^2 / (\alpha^2 + \sigma^2)$: the share of signal, whatever the scaling of the state."""
    return alpha**2 / (alpha**2 + sigma**2)


def time_of_alpha_bar(noise_schedule: NoiseSchedule, level: float) -> Tensor:
    """The noise schedule's time with this share of signal, 0-d float64.

    Raises:
        ValueError: outside (0, 1), or noisier than the noise schedule goes.
    """
    if not 0 < level < 1:
        raise ValueError(f"alpha_bar must lie in (0, 1), got {level}")
    t = noise_schedule.t_of_lam(0.5 * math.log(level / (1 - level)))
    alpha, sigma = noise_schedule.alpha_sigma(t)
    reached = alpha_bar(alpha.item(), sigma.item())
    if abs(math.log(reached / level)) > 0.05:
        raise ValueError(f"alpha_bar {level:.3g} is beyond this noise schedule, whose noisiest level is {reached:.3g}")
    return t

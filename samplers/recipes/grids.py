r"""Time grids: where the network is evaluated. Every grid maps (noise schedule, n) to n decreasing times, first t_max.

The end of the last step is not part of a grid: `times` appends it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from scipy.stats import beta as beta_distribution
from torch import Tensor

from ..noise import NoiseSchedule
from .optimised import optimal_lambdas

LAMBDA_START = -5.1  # where grids in lambda begin when alpha(t_max) = 0; arXiv:2206.00927 starts cosine schedules there
RHO = 7.0  # arXiv:2206.00364, appendix D.1

Grid = Callable[[NoiseSchedule, int], Tensor]


@dataclass(frozen=True)
class TimeGrid:
    """The times that a recipe is asked to step through.

    Attributes:
        noise: the noise schedule.
        times: n + 1 of them.
        nfe: evaluations to spend; more than n for rules that evaluate twice a step.
    """

    noise: NoiseSchedule
    times: tuple[float, ...]
    nfe: int

    @property
    def n(self) -> int:
        """Number of steps."""
        return len(self.times) - 1

    @property
    def from_pure_noise(self) -> bool:
        """Whether the start has alpha = 0, from where the noise form can only take a first-order step."""
        return bool(self.noise.alpha(self.times[0]) == 0)

    @property
    def to_zero(self) -> bool:
        """Whether the last step ends at sigma = 0, where most rules must be first order."""
        return self.times[-1] == 0.0

    def falls(self, i: int) -> bool:
        """Whether step i goes to a cleaner time."""
        return self.times[i + 1] < self.times[i]


def lambda_between(noise: NoiseSchedule, t: float, s: float, fraction: float) -> float:
    r"""The time at ``fraction`` of the way from t to s in $\lambda$; in t itself where a $\lambda$ is infinite."""
    start, end = noise.lam(t).item(), noise.lam(s).item()
    if not (math.isfinite(start) and math.isfinite(end)):
        return t + fraction * (s - t)
    return noise.t_of_lam(start + fraction * (end - start)).item()


def flow_shift(t: Tensor, shift: float) -> Tensor:
    r"""$s t / (1 + (s - 1) t)$ (arXiv:2403.03206, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def _ends(noise: NoiseSchedule) -> tuple[float, float]:
    return noise.t_max, noise.t_min


def _shifted(noise: NoiseSchedule, t: Tensor) -> Tensor:
    return flow_shift(t, noise.parameters["shift"]) if noise.kind == "flow" else t


def linspace(noise: NoiseSchedule, n: int) -> Tensor:
    """Uniform in t: n + 1 points from t_max to t_min, the last left out (``timestep_spacing="linspace"`` of DPM-Solver)."""
    start, end = _ends(noise)
    return _shifted(noise, torch.linspace(start, end, n + 1, dtype=torch.float64)[:-1])


def inclusive(noise: NoiseSchedule, n: int) -> Tensor:
    """Uniform in t: n points from t_max to t_min, both ends (``timestep_spacing="linspace"`` of DDIM and Euler)."""
    start, end = _ends(noise)
    return _shifted(noise, torch.linspace(start, end, n, dtype=torch.float64))


def trailing(noise: NoiseSchedule, n: int) -> Tensor:
    """Uniform in t: t_max (1 - i / n) (``timestep_spacing="trailing"``, arXiv:2305.08891; the usual grid of flow models)."""
    return _shifted(noise, noise.t_max * (1 - torch.arange(n, dtype=torch.float64) / n))


def leading(noise: NoiseSchedule, n: int) -> Tensor:
    """Uniform in t from the clean end: i / (n + 1) of the way up (``timestep_spacing="leading"`` of DPM-Solver).

    It does not reach t_max; kept because many checkpoints name it.
    """
    start, end = _ends(noise)
    steps = torch.arange(n, 0, -1, dtype=torch.float64)
    return _shifted(noise, end + steps * (start / (n + 1))).clamp(max=start)


def _lambda_start(noise: NoiseSchedule) -> float:
    """Where grids in lambda begin; EDM models may start as noisy as they like, since their alpha is 1."""
    low = noise.lam(noise.t_max).item()
    return low if noise.family == "edm" else max(low, LAMBDA_START)


def _level(noise: NoiseSchedule) -> tuple[float, float]:
    """sigma / alpha at the noisy and the clean end of the grids below; sigma itself for flow."""
    if noise.family == "flow":
        return noise.t_max, noise.t_min
    low, high = _lambda_start(noise), noise.lam(noise.t_min).item()
    return float(torch.exp(-torch.tensor(low, dtype=torch.float64))), float(torch.exp(-torch.tensor(high, dtype=torch.float64)))


def _t_of_level(noise: NoiseSchedule, level: Tensor) -> Tensor:
    t = level if noise.family == "flow" else noise.t_of_lam(-torch.log(level))
    t = _shifted(noise, t)
    t[0] = noise.t_max
    return t


def karras(noise: NoiseSchedule, n: int, rho: float = RHO) -> Tensor:
    r"""Uniform in $(\sigma/\alpha)^{1/\rho}$, both ends included (arXiv:2206.00364, eq. 5); flow: in $\sigma^{1/\rho}$."""
    high, low = _level(noise)
    root = torch.linspace(high ** (1 / rho), low ** (1 / rho), n, dtype=torch.float64)
    return _t_of_level(noise, root**rho)


def exponential(noise: NoiseSchedule, n: int) -> Tensor:
    r"""Uniform in $\log(\sigma/\alpha)$, both ends included; for flow in $\log\sigma$."""
    high, low = torch.tensor(_level(noise), dtype=torch.float64).log().tolist()
    return _t_of_level(noise, torch.linspace(high, low, n, dtype=torch.float64).exp())


def uniform_lambda(noise: NoiseSchedule, n: int) -> Tensor:
    r"""Uniform in $\lambda$: n + 1 points from t_max to t_min, the last left out (arXiv:2206.00927)."""
    low, high = _lambda_start(noise), noise.lam(noise.t_min).item()
    t = noise.t_of_lam(torch.linspace(low, high, n + 1, dtype=torch.float64)[:-1])
    t[0] = noise.t_max
    return t


def quadratic(noise: NoiseSchedule, n: int) -> Tensor:
    r"""Uniform in $\sqrt t$: n + 1 points, the last left out (DDIM's quadratic steps, arXiv:2010.02502, appendix D.2)."""
    start, end = _ends(noise)
    t = torch.linspace(start**0.5, end**0.5, n + 1, dtype=torch.float64).square()[:-1]
    t[0] = start
    return _shifted(noise, t)


def beta(noise: NoiseSchedule, n: int) -> Tensor:
    r"""Quantiles of Beta(0.6, 0.6) in $\sigma/\alpha$ (flow: sigma), both ends included (Lee et al. 2024, arXiv:2407.12173)."""
    high, low = _level(noise)
    return _t_of_level(noise, low + (high - low) * beta_quantiles(n))


def beta_quantiles(n: int) -> Tensor:
    """n quantiles of Beta(0.6, 0.6) from 1 to 0, both included."""
    return torch.from_numpy(beta_distribution.ppf(1 - torch.linspace(0, 1, n, dtype=torch.float64).numpy(), 0.6, 0.6))


# Ten-step grids as sigma / alpha, published with Align Your Steps (Sabour et al. 2024, arXiv:2404.14507); diffusers ships the
# same numbers. Other step counts interpolate log sigma linearly, as the authors advise.
AYS_LEVELS = {
    "ays_sd": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "ays_sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "ays_svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}


def ays(noise: NoiseSchedule, n: int, *, table: str) -> Tensor:
    """An Align Your Steps table, from t_max on.

    Raises:
        ValueError: a flow model; the tables belong to variance-preserving and EDM models.
    """
    if noise.family == "flow":
        raise ValueError(f"grid {table} belongs to variance preserving and EDM models; this one is a flow model")
    top = -_lambda_start(noise)
    logs = torch.tensor([top, *(log for level in AYS_LEVELS[table][1:] if (log := math.log(level)) < top)], dtype=torch.float64)
    place = torch.linspace(0, len(logs) - 1, n + 1, dtype=torch.float64)[:-1]
    left = place.floor().long().clamp(max=len(logs) - 2)
    t = noise.t_of_lam(-(logs[left] + (place - left) * (logs[left + 1] - logs[left])))
    t[0] = noise.t_max
    return t


def dmn(noise: NoiseSchedule, n: int) -> Tensor:
    """Minimises a bound on the error of multistep solvers, given the noise schedule alone (DMN, arXiv:2402.17376)."""
    low, high = _lambda_start(noise), noise.lam(noise.t_min).item()
    starts = [
        torch.cat([grid(noise, n)[1:], torch.tensor([noise.t_min], dtype=torch.float64)]) for grid in (linspace, quadratic)
    ]
    others = tuple((low, *noise.lam(t).tolist()) for t in starts if bool((noise.lam(t)[:-1] > low).all()))
    t = noise.t_of_lam(torch.tensor(optimal_lambdas(low, high, n, others)[:-1], dtype=torch.float64))
    t[0] = noise.t_max
    return t


GRIDS: dict[str, Grid] = {
    "linspace": linspace,
    "inclusive": inclusive,
    "trailing": trailing,
    "leading": leading,
    "lambda": uniform_lambda,
    "karras": karras,
    "exponential": exponential,
    "quadratic": quadratic,
    "beta": beta,
    "dmn": dmn,
    **{name: partial(ays, table=name) for name in AYS_LEVELS},
}
GRID_ALIASES = {
    "logsnr": "lambda",
    "lu": "exponential",  # DPM-Solver's lambda grid with both ends
    "polynomial": "karras",
    "uniform": "linspace",
    "normal": "inclusive",
    "ddim_uniform": "leading",
    "sgm_uniform": "trailing",
    "simple": "trailing",
    "ays": "ays_sd",
}
DEFAULT_GRIDS = {"vp": "linspace", "edm": "karras", "flow": "trailing"}


def grid_named(name: str) -> Grid:
    """The grid called ``name``.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    name = GRID_ALIASES.get(name, name)
    if name not in GRIDS:
        raise ValueError(f"unknown grid {name!r}; known: {', '.join([*GRIDS, *GRID_ALIASES])}")
    return GRIDS[name]


def times(noise: NoiseSchedule, grid: Grid, n: int, final: str, rho: float = RHO) -> tuple[float, ...]:
    """n evaluation times and the final one.

    Args:
        noise: the noise schedule.
        grid: see `GRIDS`.
        n: number of steps.
        final: "zero" ends at sigma = 0, "sigma_min" at t_min.
        rho: exponent of the Karras grid.

    Raises:
        ValueError: ``final`` is neither, or the grid does not fit n points above the end.
    """
    if final not in ("zero", "sigma_min"):
        raise ValueError(f"unknown final {final!r}; known: zero, sigma_min")
    both_ends = grid in (karras, exponential, inclusive, beta)
    if grid is karras:
        grid = partial(karras, rho=rho)
    if final == "sigma_min" and both_ends:
        points = grid(noise, n + 1)  # these include t_min, which is then the end itself
        return (*points[:-1].tolist(), noise.t_min)
    starts = grid(noise, n).tolist()
    if final == "sigma_min" and starts[-1] <= noise.t_min:
        raise ValueError(
            f"with {n} steps this grid evaluates at t = {starts[-1]:.3g}, not above the end t_min = {noise.t_min:.3g} that "
            "final=sigma_min asks for; use final=zero or another grid"
        )
    return (*starts, 0.0 if final == "zero" else noise.t_min)

r"""Time grids: where the network is evaluated. Every grid maps (noise schedule, n) to n decreasing times, first t_max.

The end of the last step is not part of a grid: `times` appends it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..noise import NoiseSchedule

LAMBDA_START = -5.1  # where grids in lambda begin when alpha(t_max) = 0; arXiv:2206.00927 starts cosine schedules there
RHO = 7.0  # arXiv:2206.00364, appendix D.1

Grid = Callable[[NoiseSchedule, int], Tensor]


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


def _level(noise: NoiseSchedule) -> tuple[float, float]:
    """sigma / alpha at the noisy and the clean end of the grids below; sigma itself for flow."""
    if noise.family == "flow":
        return noise.t_max, noise.t_min
    low, high = noise.lam(noise.t_max).item(), noise.lam(noise.t_min).item()
    return float(torch.exp(-torch.tensor(max(low, LAMBDA_START), dtype=torch.float64))), float(
        torch.exp(-torch.tensor(high, dtype=torch.float64))
    )


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
    low, high = max(noise.lam(noise.t_max).item(), LAMBDA_START), noise.lam(noise.t_min).item()
    t = noise.t_of_lam(torch.linspace(low, high, n + 1, dtype=torch.float64)[:-1])
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
}
GRID_ALIASES = {"logsnr": "lambda", "uniform": "linspace", "sgm_uniform": "trailing", "simple": "trailing"}
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


def round_to_training_steps(noise: NoiseSchedule, t: Tensor) -> Tensor:
    """Times moved to the nearest training step of a discrete noise schedule, as in-tree schedulers do."""
    if noise.kind != "vp_discrete":
        return t
    return noise.t_of_timestep(noise.timestep(t).round().clamp(min=0))


def times(noise: NoiseSchedule, grid: Grid, n: int, final: str) -> tuple[float, ...]:
    """n evaluation times and the final one.

    Args:
        noise: the noise schedule.
        grid: see `GRIDS`.
        n: number of steps.
        final: "zero" ends at sigma = 0, "sigma_min" at t_min.

    Raises:
        ValueError: ``final`` is neither, or the grid does not fit n points above the end.
    """
    if final not in ("zero", "sigma_min"):
        raise ValueError(f"unknown final {final!r}; known: zero, sigma_min")
    if final == "sigma_min" and grid in (karras, exponential, inclusive):
        points = grid(noise, n + 1)  # these include t_min, which is then the end itself
        return (*points[:-1].tolist(), noise.t_min)
    return (*grid(noise, n).tolist(), 0.0 if final == "zero" else noise.t_min)

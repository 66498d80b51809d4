r"""Estimating the statistics of a denoiser, from data noised to every node (arXiv:2310.13268, section 3.2 and appendix C).

In $y = x / \alpha$ the sampling ODE is $y' = D - y$, D the x0-prediction and ' the derivative in lambda along its
solutions. Then $f = (1 - l) y - D$ and

    l = 1 - alpha E[diag dD/dx],   (s, b) = least squares of f' = (1 - l)(D - y) - l' y - D' on f.

f and f' are linear in l and l', so one pass over the data gathers the moments from which everything follows.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from scipy.interpolate import CubicSpline
from torch import Tensor
from torch.autograd import forward_ad as fw
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..noise import NoiseSchedule
from .grid import node_grid

Denoiser = Callable[[Tensor, Tensor], Tensor]
Progress = Callable[[int, int | None], None]
Pool = Literal["none", "channels", "all"]
Estimate = tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]  # lam, l, s, b and the settings
CHECKPOINT = "empirical-statistics-moments/1"
MOMENTS = ("slope", "y", "d", "dd", "yy", "yd", "dd2", "ydd", "ddd")  # see `_moments`
VANISHING = 1e-10  # variance of f, relative, below which it is rounding and tells nothing about s


@dataclass
class _Sums:
    """Sums over samples, (nodes, *E) each, and how far the data has been read."""

    values: dict[str, Tensor]
    samples: int = 0
    batches: int = 0


def estimate(
    denoiser: Denoiser,
    noise_schedule: NoiseSchedule,
    x0: Tensor | Iterable[Tensor],
    nodes: int = 120,
    generator: torch.Generator | None = None,
    *,
    batch_size: int = 64,
    t_start: float | None = None,
    t_end: float | None = None,
    pool: Pool = "none",
    probes: int = 1,
    derivatives: Literal["forward", "difference"] = "forward",
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> Estimate:
    """Estimate the statistics of ``denoiser``; see `samplers.statistics.EmpiricalStatistics.estimate`."""
    _check_options(nodes, batch_size, probes, pool, derivatives)
    lam = node_grid(noise_schedule, nodes, t_start, t_end)
    settings = {
        "lam": [lam[0].item(), lam[-1].item()],
        "nodes": nodes,
        "pool": pool,
        "probes": probes,
        "derivatives": derivatives,
        "batch_size": batch_size,
    }
    sums, seed = _resume(checkpoint, settings)
    if seed is None:
        seed = int(torch.randint(2**62, (), generator=generator).item())
    total = _batches(x0, batch_size)
    for i, batch in enumerate(_split(x0, batch_size)):
        if i < sums.batches:
            continue
        _check_batch(batch, sums, pool)
        own = torch.Generator(batch.device).manual_seed((seed + i) % 2**63)
        added = _Sums({})
        for k, moments in _over_nodes(denoiser, noise_schedule, lam, batch, own, probes, derivatives):
            _gather(added, moments, k, nodes + 1, pool)
            if progress is not None:
                progress(i * (nodes + 1) + k + 1, None if total is None else total * (nodes + 1))
        for name, value in added.values.items():
            sums.values[name] = sums.values[name] + value if name in sums.values else value
        sums.samples, sums.batches = sums.samples + len(batch), i + 1
        if checkpoint is not None:
            _save(Path(checkpoint), sums, seed, settings)
    if not sums.samples:
        raise ValueError("x0 holds no samples")
    return _solve(lam, sums, {**settings, "samples": sums.samples, "path": noise_schedule.kind})


def _check_options(nodes: int, batch_size: int, probes: int, pool: str, derivatives: str) -> None:
    if nodes < 2:
        raise ValueError(f"nodes must be at least 2, got {nodes}")
    if batch_size < 1 or probes < 1:
        raise ValueError(f"batch_size and probes must be at least 1, got {batch_size} and {probes}")
    if pool not in ("none", "channels", "all"):
        raise ValueError(f"unknown pool {pool!r}; known: none, channels, all")
    if derivatives not in ("forward", "difference"):
        raise ValueError(f"unknown derivatives {derivatives!r}; known: forward, difference")


# ---- one batch at one node -----------------------------------------------------------------------------------------------


def _over_nodes(
    denoiser: Denoiser,
    noise_schedule: NoiseSchedule,
    lam: Tensor,
    batch: Tensor,
    generator: torch.Generator,
    probes: int,
    derivatives: str,
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """The moments at every node, from the same noise and probes: statistics come out smooth in lambda, as l' needs."""
    x = batch.to(torch.promote_types(batch.dtype, torch.float32))
    noise = _normal(x, generator)
    signs = [torch.sign(_normal(x, generator)) for _ in range(probes)]
    for k in range(len(lam)):
        yield k, _moments(denoiser, noise_schedule, lam, k, x, noise, signs, derivatives)


def _moments(
    denoiser: Denoiser,
    noise_schedule: NoiseSchedule,
    lam: Tensor,
    k: int,
    x0: Tensor,
    noise: Tensor,
    signs: list[Tensor],
    derivatives: str,
) -> dict[str, Tensor]:
    """Per sample, (B, *E) float64: y, D, D' and their products, and alpha diag(dD/dx) by Hutchinson's estimate."""
    delta = torch.finfo(x0.dtype).eps ** (1 / 3)  # balances truncation and rounding of a central difference

    def at(u: Tensor) -> tuple[Tensor, float]:
        t = noise_schedule.t_of_lam(u)
        return t, noise_schedule.alpha(t).item()

    t, alpha = at(lam[k])
    y = x0 + torch.exp(-lam[k]).item() * noise

    def d_of(y: Tensor, t: Tensor = t, alpha: float = alpha) -> Tensor:
        return denoiser(alpha * y, t)

    d, slope = _slope(d_of, y, signs, derivatives, delta)

    def ahead(step: float) -> Tensor:
        """D a little further along the ODE: its derivative there is D'."""
        return d_of(y + step * (d - y), *at(lam[k] + step))

    with torch.no_grad():
        if 0 < k < len(lam) - 1:
            change = (ahead(delta) - ahead(-delta)) / (2 * delta)
        else:  # to the inner side of the grid, of the same order
            h = delta if k == 0 else -delta
            change = (4 * ahead(h) - ahead(2 * h) - 3 * d) / (2 * h)
    y, d, slope, change = (value.double() for value in (y, d, slope, change))
    products = (slope, y, d, change, y * y, y * d, d * d, y * change, d * change)
    return dict(zip(MOMENTS, products, strict=True))


def _slope(
    function: Callable[[Tensor], Tensor], y: Tensor, signs: list[Tensor], how: str, delta: float
) -> tuple[Tensor, Tensor]:
    """``function(y)`` and the diagonal of its Jacobian, by Hutchinson's estimate: the mean of v * (J v) over signs v."""
    values, slopes = [], []
    with torch.no_grad():
        for sign in signs:
            if how == "forward":
                value, derivative = _forward(function, y, sign)
                values.append(value)
            else:
                derivative = (function(y + delta * sign) - function(y - delta * sign)) / (2 * delta)
            slopes.append(sign * derivative)
        return values[0] if values else function(y), torch.stack(slopes).mean(0)


def _forward(function: Callable[[Tensor], Tensor], y: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """The value and the Jacobian-vector product, in forward mode."""
    with warnings.catch_warnings():
        # torch loads its forward-mode rules at first use and warns about how it does that.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.")
        # Fused attention has no forward mode; the plain one does.
        with fw.dual_level(), sdpa_kernel(SDPBackend.MATH):
            try:
                value, derivative = fw.unpack_dual(function(fw.make_dual(y, direction)))  # type: ignore[no-untyped-call]
            except (NotImplementedError, RuntimeError) as error:
                if "forward" not in str(error):
                    raise
                reason = str(error).splitlines()[0]
                raise RuntimeError(
                    f"the denoiser has an operator without forward-mode derivatives ({reason}); use derivatives='difference'"
                ) from error
    return value, torch.zeros_like(value) if derivative is None else derivative


def _gather(sums: _Sums, moments: dict[str, Tensor], k: int, nodes: int, pool: Pool) -> None:
    for name, value in moments.items():
        axes = tuple(range(2 if pool == "channels" else 1, value.ndim)) if pool != "none" else ()
        total = value.mean(axes, keepdim=pool == "channels").sum(0) if axes else value.sum(0)
        if name not in sums.values:
            sums.values[name] = total.new_zeros((nodes, *total.shape))
        sums.values[name][k] = total


# ---- from moments to statistics ----------------------------------------------------------------------------------------------


def _solve(lam: Tensor, sums: _Sums, provenance: dict[str, Any]) -> Estimate:
    """Least squares of f' on f at every node."""
    slope, y, d, dd, yy, yd, d2, ydd, ddd = (sums.values[name] / sums.samples for name in MOMENTS)
    l = 1 - slope
    rate = torch.from_numpy(CubicSpline(lam.numpy(), l.cpu().numpy()).derivative()(lam.numpy())).to(l)
    keep = 1 - l  # f = keep y - D and f' = -(keep + rate) y + keep D - D'
    own = keep + rate
    f, f1 = keep * y - d, -own * y + keep * d - dd
    ff = keep**2 * yy - 2 * keep * yd + d2
    ff1 = keep * (-own * yy + keep * yd - ydd) - (-own * yd + keep * d2 - ddd)
    variance, covariance = ff - f * f, ff1 - f * f1
    floor = VANISHING * (keep**2 * yy + d2)
    s = torch.where(variance > floor, covariance / variance.clamp(min=1e-300), 0.0)
    return lam, l.cpu(), s.cpu(), (f1 - s * f).cpu(), provenance


# ---- the data and the checkpoint -----------------------------------------------------------------------------------------


def _split(x0: Tensor | Iterable[Tensor], batch_size: int) -> Iterator[Tensor]:
    return iter(torch.split(x0, batch_size)) if torch.is_tensor(x0) else iter(x0)


def _batches(x0: Tensor | Iterable[Tensor], batch_size: int) -> int | None:
    if torch.is_tensor(x0):
        return -(-len(x0) // batch_size)
    return len(x0) if isinstance(x0, Sized) else None


def _check_batch(batch: Any, sums: _Sums, pool: Pool) -> None:
    if not torch.is_tensor(batch) or not batch.is_floating_point() or batch.ndim < 2 or not len(batch):
        what = f"{tuple(batch.shape)} {batch.dtype}" if torch.is_tensor(batch) else type(batch).__name__
        raise ValueError(f"x0 must hold floating-point tensors (B, *E) with B >= 1, got {what}")
    if pool == "channels" and batch.ndim < 3:
        raise ValueError(f"pool='channels' needs samples with a channel axis, (B, C, ...), got {tuple(batch.shape)}")
    if pool == "none" and sums.values and batch.shape[1:] != sums.values["y"].shape[1:]:
        raise ValueError(f"samples of shape {tuple(batch.shape[1:])} after ones of {tuple(sums.values['y'].shape[1:])}")


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def _save(path: Path, sums: _Sums, seed: int, settings: dict[str, Any]) -> None:
    meta = {"format": CHECKPOINT, "settings": json.dumps(settings), "seed": str(seed)}
    partial = path.with_name(path.name + ".part")
    counts = {"samples": str(sums.samples), "batches": str(sums.batches)}
    save_file({name: value.cpu().contiguous() for name, value in sums.values.items()}, partial, {**meta, **counts})
    partial.replace(path)


def _resume(path: str | Path | None, settings: dict[str, Any]) -> tuple[_Sums, int | None]:
    if path is None or not Path(path).exists():
        return _Sums({}), None
    with safe_open(path, framework="pt") as file:
        meta = file.metadata() or {}
        if meta.get("format") != CHECKPOINT:
            raise ValueError(f"{path}: not the checkpoint of an estimate; choose another file")
        if json.loads(meta["settings"]) != settings:
            raise ValueError(f"{path}: made with {meta['settings']}, now {json.dumps(settings)}; choose another file")
        values = {name: file.get_tensor(name) for name in MOMENTS}
    return _Sums(values, int(meta["samples"]), int(meta["batches"])), int(meta["seed"])

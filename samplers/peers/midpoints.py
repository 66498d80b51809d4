r"""Steps with evaluations of their own: AMED's midpoint, EPD's parallel midpoints, and AdaSDE's with fresh noise.

All in the frame $y = x / \alpha$, $s = \sigma / \alpha$. From $(y_n, s_n)$ with slope d, the midpoint k lies at
$s_k = s_n^{1 - r_k} s_{n+1}^{r_k}$, $y_k = y_n + (s_k - s_n) d$; its slope is $d_k = (y_k - D(y_k, a_k s_k)) / s_k$, and
$y_{n+1} = y_n + (s_{n+1} - s_n) \sum_k w_k c_k d_k$.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..engine import Denoiser
from ..noise import NoiseSchedule
from ..strategy import Evaluation, SolverSchedule
from .learned import edm_levels, told_level
from .reading import Source, number_array, read_table
from .rows import Row, from_rows

ADASDE_SOFTNESS = 2.0
ADASDE_GAMMA_MIN, ADASDE_START = 2e-4, 0.6
_SAME = 1e-9  # relative distance below which two midpoints would be one node


@dataclass(frozen=True)
class Midpoint:
    """One evaluation inside a step.

    Attributes:
        r: place between the step's ends on the log scale of the level, in (0, 1).
        weight: of its slope.
        direction: scales the slope.
        time: scales the level that the network is told.
    """

    r: float
    weight: float = 1.0
    direction: float = 1.0
    time: float = 1.0


def from_midpoints(
    noise_schedule: NoiseSchedule,
    levels: Sequence[float],
    midpoints: Sequence[Sequence[Midpoint]],
    *,
    gammas: Sequence[float] | None = None,
    afs: bool = False,
    name: str = "midpoints",
    provenance: Mapping[str, Any] | None = None,
) -> SolverSchedule:
    r"""The schedule of steps with midpoints; ``Tableau.depth`` counts evaluations that can run in parallel as one.

    Args:
        noise_schedule: the model's; EDM where a midpoint scales the time.
        levels: (steps + 1,) decreasing values of sigma / alpha.
        midpoints: per step, at least one; their order does not matter.
        gammas: per step: first raise the level to (1 + gamma) s with fresh noise (AdaSDE); 0 for none.
        afs: the first slope is $y / \sqrt{1 + s^2}$ (for variance-preserving models eps = x) without an evaluation.
        name: for people.
        provenance: where the numbers come from.

    Raises:
        ValueError: lengths that do not fit, a midpoint outside its step or two at one place, or noise at the first step.
    """
    steps = len(levels) - 1
    if steps < 1 or len(midpoints) != steps or not all(midpoints) or (gammas is not None and len(gammas) != steps):
        raise ValueError(f"{len(levels)} levels need midpoints (and gammas) for {steps} steps, at least one midpoint each")
    raised = [0.0] * steps if gammas is None else [float(g) for g in gammas]
    if raised[0] != 0 or min(raised) < 0:
        raise ValueError("gammas must be >= 0, and 0 at the first step, where everything is noise already")
    nodes, rows = [float(levels[0])], list[Row | None]()
    scales: dict[int, float] = {}
    for i, (own, gamma) in enumerate(zip(midpoints, raised, strict=True)):
        if gamma:
            nodes.append((1 + gamma) * nodes[-1])
            rows.append(None)
        start, level, end = len(nodes) - 1, nodes[-1], float(levels[i + 1])
        slope = Row(x={0: (1 + level**2) ** -0.5}) if afs and i == 0 else Row.slope(start, level)
        total = Row.state(start)
        inner = sorted(own, key=lambda point: point.r)
        for k, point in enumerate(inner):
            if not 0 < point.r < 1 or (k and abs(point.r - inner[k - 1].r) < _SAME):
                raise ValueError(
                    f"step {i}: midpoints must lie apart and inside (0, 1), got {', '.join(f'{p.r:g}' for p in inner)}"
                )
            middle = level ** (1 - point.r) * end**point.r
            rows.append(Row.state(start).add(middle - level, slope))
            nodes.append(middle)
            if point.time != 1.0:
                scales[len(nodes) - 1] = point.time
            total.add((end - level) * point.weight * point.direction, Row.slope(len(nodes) - 1, middle))
        nodes.append(end)
        rows.append(total)
    times = noise_schedule.t_of_lam(-torch.tensor(nodes, dtype=torch.float64).log()).tolist()
    alphas = noise_schedule.alpha(torch.tensor(times, dtype=torch.float64)).tolist()
    framed = [None if row is None else row.from_frame(alphas, i + 1) for i, row in enumerate(rows)]
    evaluations = {node: told_level(noise_schedule, times[node], scale) for node, scale in scales.items()}
    if afs:
        evaluations[0] = Evaluation(source="zero_x0")
    return from_rows(times, framed, noise_schedule, evaluations=evaluations, name=name, provenance=provenance)


def from_epd(source: Source, noise_schedule: NoiseSchedule, *, levels: Sequence[float] | None = None) -> SolverSchedule:
    r"""EPD-Solver's static tables (arXiv:2507.14797): K parallel midpoints a step with simplex weights.

    Args:
        source: a mapping or file with ``r_params``, ``weight_s`` and, where ``scale_dir`` or ``scale_time`` is not 0,
            ``scale_dir_params`` or ``scale_time_params``, all (steps, K) before their sigmoid or softmax; optionally ``afs``
            and ``fcn`` (the last step's direction is not scaled).
        noise_schedule: the model's.
        levels: (steps + 1,) values of sigma; None is the rho = 7 grid.

    Raises:
        ValueError: not such a table.
    """
    table = read_table(source)
    r, weight = torch.sigmoid(number_array(table, "r_params", 2)), torch.softmax(number_array(table, "weight_s", 2), -1)

    def scale(kind: str) -> Tensor:
        width = float(table.get(f"scale_{kind}") or 0.0)
        if not width:
            return torch.ones_like(r)
        return 2 * torch.sigmoid(0.5 * number_array(table, f"scale_{kind}_params", 2)) * width + (1 - width)

    return _from_grids(noise_schedule, levels, table, r, weight, scale("dir"), scale("time"), None, "epd")


def from_adasde(source: Source, noise_schedule: NoiseSchedule, *, levels: Sequence[float] | None = None) -> SolverSchedule:
    r"""AdaSDE's static tables (arXiv:2510.23285): EPD's steps, each after raising the level by a learned gamma.

    Args:
        source: as in `from_epd`, with ``gamma`` (the largest gamma) and ``gamma_params`` (steps, K) besides.
        noise_schedule: the model's.
        levels: (steps + 1,) values of sigma; None is the rho = 7 grid.

    Raises:
        ValueError: not such a table.
    """
    table = read_table(source)
    r, weight = torch.sigmoid(number_array(table, "r_params", 2)), torch.softmax(number_array(table, "weight_s", 2), -1)

    def scale(kind: str) -> Tensor:
        width = min(float(table.get(f"scale_{kind}") or 0.0), 0.99)
        if not width:
            return torch.ones_like(r)
        return 1 + width * torch.tanh(number_array(table, f"scale_{kind}_params", 2) / ADASDE_SOFTNESS)

    gammas = None
    if largest := float(table.get("gamma") or 0.0):
        smallest = float(table.get("gamma_min", ADASDE_GAMMA_MIN))
        start = ADASDE_SOFTNESS * torch.logit(torch.tensor(ADASDE_START, dtype=torch.float64))
        share = torch.sigmoid((number_array(table, "gamma_params", 2) + start) / ADASDE_SOFTNESS)
        gammas = ((smallest + (largest - smallest) * share) * weight).sum(-1).tolist()
        gammas[0] = 0.0
    return _from_grids(noise_schedule, levels, table, r, weight, scale("dir"), scale("time"), gammas, "adasde")


def _from_grids(
    noise: NoiseSchedule,
    levels: Sequence[float] | None,
    table: Mapping[str, Any],
    r: Tensor,
    weight: Tensor,
    direction: Tensor,
    time: Tensor,
    gammas: Sequence[float] | None,
    kind: str,
) -> SolverSchedule:
    if not r.shape == weight.shape == direction.shape == time.shape:
        raise ValueError(f"{kind} parameters should have one shape (steps, points); r_params has {tuple(r.shape)}")
    if table.get("fcn"):
        direction[-1] = 1.0
    columns = zip(r.tolist(), weight.tolist(), direction.tolist(), time.tolist(), strict=True)
    midpoints = [[Midpoint(*values) for values in zip(*row, strict=True)] for row in columns]
    return from_midpoints(
        noise,
        edm_levels(noise, levels, len(r) + 1),
        midpoints,
        gammas=gammas,
        afs=bool(table.get("afs", False)),
        name=f"{kind}-{len(r)}x{r.shape[1]}",
        provenance={"imported_from": kind},
    )


@torch.no_grad()
def amed(
    denoiser: Denoiser,
    noise_schedule: NoiseSchedule,
    x: Tensor,
    levels: Sequence[float],
    *,
    candidates: Sequence[float] = tuple(k / 20 for k in range(4, 18)),
    substeps: int = 8,
    afs: bool = False,
) -> SolverSchedule:
    r"""AMED-Solver (arXiv:2312.00094) with one midpoint per step for all samples: the averages of what its network predicts.

    Step by step on the student's own trajectory, r is the candidate and c the least-squares factor for which
    $y_n + c (s_{n+1} - s_n) d(r)$ is nearest to where ``substeps`` DPM-Solver-2 steps of the teacher go from the same state.

    Args:
        denoiser: as in `samplers.sample`.
        noise_schedule: the denoiser's.
        x: (B, *E) noise at ``levels[0]``.
        levels: (steps + 1,) decreasing values of sigma / alpha.
        candidates: places of the midpoint to try, in (0, 1).
        substeps: of the teacher per step.
        afs: as in `from_midpoints`.

    Raises:
        ValueError: as in `from_midpoints`.
    """

    def slope(y: Tensor, level: float) -> Tensor:
        t = noise_schedule.t_of_lam(-torch.tensor(level, dtype=torch.float64).log())
        return (y - denoiser(y * noise_schedule.alpha(t).item(), t)) / level

    def middle(y: Tensor, d: Tensor, level: float, end: float, r: float) -> Tensor:
        inner = level ** (1 - r) * end**r
        return slope(y + (inner - level) * d, inner)

    start = noise_schedule.t_of_lam(-torch.tensor(levels[0], dtype=torch.float64).log())
    y, found = x / noise_schedule.alpha(start).item(), []
    for i, (level, end) in enumerate(pairwise(levels)):
        fine = torch.logspace(0, 1, substeps + 1, base=end / level, dtype=torch.float64).mul(level).tolist()
        target = y
        for a, b in pairwise(fine):
            target = target + (b - a) * middle(target, slope(target, a), a, b, 0.5)
        first = y * (1 + level**2) ** -0.5 if afs and i == 0 else slope(y, level)
        best: tuple[Tensor, float, Tensor, Tensor] | None = None
        for r in candidates:
            move = (end - level) * middle(y, first, level, end, r)
            factor = ((target - y) * move).sum() / move.square().sum()
            error = (y + factor * move - target).square().sum()
            if best is None or error < best[0]:
                best = error, r, factor, move
        assert best is not None
        y = y + best[2] * best[3]
        found.append([Midpoint(best[1], direction=float(best[2]))])
    facts = {"midpoints": "amed", "noises": len(x), "teacher_substeps": substeps}
    return from_midpoints(noise_schedule, levels, found, afs=afs, name=f"amed-{len(found)}", provenance=facts)

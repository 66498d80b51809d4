"""Learned coefficient tables: GS / GAS, S4S, BNS and DyWeight, from the layouts in which their authors keep them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..noise import NoiseSchedule
from ..recipes import GRIDS
from ..strategy import Evaluation, Relax, SolverSchedule, StepStrategy
from .reading import Source, number_array, read_table
from .rows import Row, compiled_rows, from_rows


def stick_breaking(logits: Tensor, t_min: float, t_max: float = 1.0, margin: float = 1e-5) -> tuple[float, ...]:
    r"""Times from logits as GS learns them (arXiv:2510.17699, eq. 14): $1 - \prod_k \mu_k$ of the range, $\mu$ a sigmoid.

    Args:
        logits: (steps - 1,).
        t_min: the last time.
        t_max: the first.
        margin: keeps every factor off 0 and 1.

    Returns:
        steps + 1 decreasing times.
    """
    mu = torch.sigmoid(logits.to(torch.float64)) * (1 - 2 * margin) + margin
    inner = (1 - mu.cumprod(0)) * (t_max - t_min) + t_min
    return (t_max, *inner.flip(0).tolist(), t_min)


def from_gs(source: Source, noise_schedule: NoiseSchedule, *, t_min: float | None = None) -> SolverSchedule:
    r"""GS and GAS (arXiv:2510.17699): residuals on DPM-Solver++(3M) over all states and predictions, with learned times.

    Args:
        source: a mapping or file with ``mu_logit`` (steps - 1,), ``t_couple`` (steps,) and ``c1_diff``, ``a1_diff``,
            ``c2_diff``, ... (steps,) each; or a training checkpoint, whose ``ema.shadow_params`` are these in that order.
        noise_schedule: the model's, variance preserving with t in (0, 1].
        t_min: the last time; None is the noise schedule's.

    Raises:
        ValueError: not such a table, or another family.
    """
    if noise_schedule.family != "vp":
        raise ValueError(f"GS tables belong to variance-preserving models; this noise schedule is {noise_schedule.kind}")
    table = _gs_table(read_table(source))
    logits, shift = number_array(table, "mu_logit", 1), number_array(table, "t_couple", 1)
    steps, order = len(shift), sum(name[0] == "c" and name.endswith("_diff") for name in table)
    if len(logits) != steps - 1 or order < 1:
        raise ValueError(f"a GS table of {steps} steps has {steps - 1} logits and c1_diff, a1_diff, ...; got {len(logits)}")
    c, a = ([number_array(table, f"{kind}{k}_diff", 1).tolist() for k in range(1, order + 1)] for kind in "ca")
    times = stick_breaking(logits, noise_schedule.t_min if t_min is None else t_min, noise_schedule.t_max)
    nodes = [noise_schedule.alpha_sigma(t) for t in times]
    told = [noise_schedule.alpha_sigma(times[j] + shift[j].item()) for j in range(steps)]
    rows = []
    for i, base in enumerate(compiled_rows(_theory(times, min(order, 3)), noise_schedule)):
        row = Row(x=dict(base.x))
        depth = min(i + 1, order)
        # The learned c of the newest term and of the differences enter with the theory's own signs.
        predictions = {j: base.x0.get(j, 0.0) for j in range(i + 1)}
        for k, weight in enumerate(_gs_predictions(times, i, depth, noise_schedule, [c[m][i] for m in range(depth)])):
            predictions[i - k] = predictions.get(i - k, 0.0) + weight
        for k in range(depth):
            row.add(a[k][i], Row.state(i - k))
        for j, weight in predictions.items():
            (alpha, sigma), (alpha_told, sigma_told) = nodes[j], told[j]
            # x0 = (x - sigma eps) / alpha with eps = (x - alpha' D) / sigma': the noise prediction of the told time
            ratio = (sigma / sigma_told).item()
            row.add(weight * (1 - ratio) / alpha.item(), Row.state(j))
            row.add(weight * ratio * (alpha_told / alpha).item(), Row.prediction(j))
        rows.append(row)
    evaluations = {j: Evaluation(t_shift=shift[j].item()) for j in range(steps) if shift[j]}
    facts = {"imported_from": "gs", "order": order}
    return from_rows(times, rows, noise_schedule, evaluations=evaluations, name=f"gs-nfe{steps}", provenance=facts)


def _gs_table(table: Mapping[str, Any]) -> dict[str, Any]:
    ema = table.get("ema")
    if not isinstance(ema, Mapping):
        return dict(table)
    parameters = list(ema.get("shadow_params", ()))
    if len(parameters) < 4 or len(parameters) % 2:
        raise ValueError(f"a GS checkpoint has mu_logit, t_couple and pairs of coefficients; got {len(parameters)} parameters")
    names = ["mu_logit", "t_couple", *(f"{kind}{k}_diff" for k in range(1, len(parameters) // 2) for kind in "ca")]
    return dict(zip(names, parameters, strict=True))


def _theory(times: Sequence[float], order: int) -> SolverSchedule:
    """DPM-Solver++ as GS starts from it: the midpoint rule, a halved second derivative at order 3, no lower final order."""
    orders = [min(order, i + 1) for i in range(len(times) - 1)]
    relax: dict[int, tuple[Relax, ...]] = {1: (), 2: ("bh2",), 3: (None, "half")}
    return SolverSchedule(times=tuple(times), steps=tuple(StepStrategy(order=p, relax=relax[p]) for p in orders))


def _gs_predictions(times: Sequence[float], i: int, depth: int, noise: NoiseSchedule, learned: Sequence[float]) -> list[float]:
    """What the learned c add to the predictions at nodes i, i - 1, ...: they multiply differences, as the theory's do."""
    lam = [noise.lam(t).item() for t in times[: i + 2]]
    h = lam[i + 1] - lam[i]
    if depth == 1:
        return [-learned[0]]
    r0 = (lam[i] - lam[i - 1]) / h
    if depth == 2:
        return [-learned[0] - learned[1] / r0, learned[1] / r0]
    r1 = (lam[i - 1] - lam[i - 2]) / h
    first, second = (1 / r0, -1 / r0, 0.0), (0.0, 1 / r1, -1 / r1)
    out = [-learned[0], 0.0, 0.0, *learned[3:]]
    for k in range(3):
        bend = (first[k] - second[k]) / (r0 + r1)
        out[k] += learned[1] * (first[k] + r0 * bend) - learned[2] * bend
    return out


def from_s4s(times: Sequence[float], weights: Sequence[Sequence[float]], noise_schedule: NoiseSchedule) -> SolverSchedule:
    r"""S4S's linear multistep table (arXiv:2502.17423, appendix C.1).

    $x_{i+1} = (\sigma_{i+1} / \sigma_i) x_i - \alpha_{i+1} (e^{-h} - 1) \sum_k b_{ik} D_{i-k}$.

    Args:
        times: steps + 1 decreasing times.
        weights: per step b of the newest prediction, the one before, ...; DDIM is (1,) everywhere.
        noise_schedule: the model's.

    Raises:
        ValueError: lengths that do not fit.
    """
    if len(weights) != len(times) - 1:
        raise ValueError(f"{len(times)} times need {len(times) - 1} rows of weights, got {len(weights)}")
    base = compiled_rows(SolverSchedule(times=tuple(times), steps=(StepStrategy(),) * len(weights)), noise_schedule)
    rows = []
    for i, own in enumerate(weights):
        if len(own) > i + 1:
            raise ValueError(f"row {i} weighs {len(own)} predictions, but there are {i + 1}")
        scale = base[i].x0.get(i, 0.0)
        rows.append(Row(x=dict(base[i].x), x0={i - k: scale * float(b) for k, b in enumerate(own)}))
    return from_rows(times, rows, noise_schedule, name=f"s4s-nfe{len(rows)}", provenance={"imported_from": "s4s"})


def from_bns(
    times: Sequence[float], a: Sequence[float], b: Sequence[Sequence[float]], noise_schedule: NoiseSchedule
) -> SolverSchedule:
    r"""Bespoke non-stationary solvers (arXiv:2403.01329, eq. 12): $x_{i+1} = a_i x_0 + \sum_{j \le i} b_{ij} u_j$.

    Args:
        times: steps + 1 times of this package: noise first.
        a: (steps,) coefficients of the starting noise.
        b: per step i, i + 1 coefficients of the velocities u = eps - x0 at the nodes 0..i.
        noise_schedule: a flow model's.

    Raises:
        ValueError: lengths that do not fit, or no flow model.
    """
    if noise_schedule.family != "flow":
        raise ValueError(f"BNS tables are in terms of a flow model's velocity; this noise schedule is {noise_schedule.kind}")
    if not len(times) - 1 == len(a) == len(b):
        raise ValueError(f"{len(times)} times need {len(times) - 1} values of a and rows of b, got {len(a)} and {len(b)}")
    rows = []
    for i, own in enumerate(b):
        if len(own) != i + 1:
            raise ValueError(f"row {i} of b has {len(own)} coefficients, expected {i + 1}")
        row = Row(x={0: float(a[i])})
        for j, value in enumerate(own):
            row.add(float(value), Row.slope(j, times[j]))  # u = (x - x0) / t where alpha = 1 - t, sigma = t
        rows.append(row)
    return from_rows(times, rows, noise_schedule, name=f"bns-nfe{len(rows)}", provenance={"imported_from": "bns"})


def edm_levels(noise_schedule: NoiseSchedule, levels: Sequence[float] | None, count: int) -> list[float]:
    """``count`` values of sigma / alpha: the given ones, or the rho = 7 grid with both ends that these tables use.

    Raises:
        ValueError: another number of levels, or a family whose sigma / alpha is infinite at the start.
    """
    if noise_schedule.alpha(noise_schedule.t_max) == 0:
        raise ValueError(
            f"tables in sigma need a model with finite sigma / alpha; this noise schedule is {noise_schedule.kind}"
        )
    if levels is None:
        return (-noise_schedule.lam(GRIDS["karras"](noise_schedule, count))).exp().tolist()
    if len(levels) != count:
        raise ValueError(f"the table has {count} times, got {len(levels)}")
    return [float(level) for level in levels]


def told_level(noise_schedule: NoiseSchedule, t: float, scale: float) -> Evaluation:
    """The network is told ``scale`` times the level.

    Raises:
        ValueError: it would have to be told so outside the EDM frame.
    """
    if scale != 1.0 and noise_schedule.family != "edm":
        raise ValueError(
            f"the table scales the level that the network is told, which needs an EDM model, not {noise_schedule.kind}"
        )
    return Evaluation(t_scale=scale)


def from_dyweight(
    source: Source, noise_schedule: NoiseSchedule, *, levels: Sequence[float] | None = None, afs: bool | None = None
) -> SolverSchedule:
    r"""DyWeight (arXiv:2603.11607): $y_{i+1} = y_i + (s'_{i+1} - s_i) \sum_j w_{ij} d_j$; rows need not sum to 1.

    The level that a state counts as is carried along: $s_{i+1} = s_i + (s'_{i+1} - s_i) \sum_j w_{ij}$, s' the nominal grid.

    Args:
        source: a mapping or file with ``hybrid_weights`` (steps, steps), optionally ``mask`` of that shape, ``t_scale``
            (steps, or one less with ``afs``) and ``afs``.
        noise_schedule: the model's; EDM where ``t_scale`` is not 1.
        levels: (steps + 1,) nominal values of sigma; None is the rho = 7 grid.
        afs: whether the first slope is $y / \sqrt{1 + s^2}$ without an evaluation; None takes the table's own ``afs``.

    Raises:
        ValueError: not such a table.
    """
    table = read_table(source)
    weights = number_array(table, "hybrid_weights", 2)
    steps = len(weights)
    if weights.shape != (steps, steps):
        raise ValueError(f"hybrid_weights should be square, got {tuple(weights.shape)}")
    if table.get("mask") is not None:
        weights = weights * number_array(table, "mask", 2)
    weights = weights.tril()
    analytic = bool(table.get("afs", False)) if afs is None else afs
    scales = [1.0] * steps
    if table.get("t_scale") is not None:
        learned = number_array(table, "t_scale", 1).abs().tolist()
        if len(learned) != steps - analytic:
            raise ValueError(f"t_scale should have {steps - analytic} entries, got {len(learned)}")
        scales = [1.0] * analytic + learned
    nominal = edm_levels(noise_schedule, levels, steps + 1)
    true = [nominal[0]]
    for i in range(steps):
        true.append(true[i] + weights[i].sum().item() * (nominal[i + 1] - true[i]))
    if min(true) <= 0:
        raise ValueError(f"the weights carry the level below zero: {', '.join(f'{s:.4g}' for s in true)}")
    slopes = [Row.slope(j, s) for j, s in enumerate(true[:-1])]
    if analytic:
        slopes[0] = Row(x={0: (1 + true[0] ** 2) ** -0.5})
    rows = []
    for i in range(steps):
        row = Row.state(i)
        for j in range(i + 1):
            row.add((nominal[i + 1] - true[i]) * weights[i, j].item(), slopes[j])
        rows.append(row)
    return _from_frame(true, rows, noise_schedule, scales, analytic, "dyweight")


def _from_frame(
    levels: Sequence[float], rows: Sequence[Row], noise: NoiseSchedule, scales: Sequence[float], analytic: bool, kind: str
) -> SolverSchedule:
    times = [noise.t_of_lam(-torch.tensor(level, dtype=torch.float64).log()).item() for level in levels]
    alphas = noise.alpha(torch.tensor(times, dtype=torch.float64)).tolist()
    evaluations = {i: told_level(noise, times[i], scale) for i, scale in enumerate(scales) if scale != 1.0}
    if analytic:
        evaluations[0] = Evaluation(source="zero_x0")
    own = [row.from_frame(alphas, i + 1) for i, row in enumerate(rows)]
    name = f"{kind}-nfe{len(rows) - analytic}"
    return from_rows(times, own, noise, evaluations=evaluations, name=name, provenance={"imported_from": kind})

"""Training-free schedules a learned sampler must beat: optimal token counts, and times that jump where little changes."""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels import uniform
from .processes import MaskedProcess, Process
from .run import Model
from .table import DiscreteTable


def reveal_losses(
    model: Model, process: MaskedProcess, ids: Tensor, generator: torch.Generator | None = None, stride: int = 1
) -> Tensor:
    """Mean NLL (L,) float64 of a masked token when m random others are known, m = 0 .. L - 1.

    Args:
        model: the denoiser, evaluated at the time whose mask ratio is (L - m) / L.
        process: its process.
        ids: (n, L) data, or samples of a many-step teacher.
        generator: of the masks.
        stride: measure every so many m, and interpolate between them.
    """
    length = ids.shape[1]
    points = sorted({*range(0, length, stride), length - 1})
    found = []
    for known in points:
        rank = torch.rand(ids.shape, generator=generator).to(ids.device).argsort(-1).argsort(-1)
        masked = rank >= known
        t = process.schedule.t_of_alpha(torch.tensor(known / length).clamp(min=float(process.alpha(1.0))))
        with torch.no_grad():
            probs = model(ids.masked_fill(masked, process.mask_id), t)
        nll = -probs.gather(-1, ids[..., None])[..., 0].clamp(min=1e-30).log()
        found.append(float(nll[masked].double().mean()))
    out = torch.empty(length, dtype=torch.float64)
    for (a, fa), (b, fb) in zip(zip(points, found, strict=True), zip(points[1:], found[1:], strict=True), strict=False):
        out[a : b + 1] = torch.linspace(fa, fb, b - a + 1, dtype=torch.float64)
    return out if len(points) > 1 else torch.tensor(found, dtype=torch.float64)


def optimal_counts(losses: Tensor, steps: int) -> list[int]:
    """Counts n_k, sum L, that minimise sum n_k h(m_k), m_k the tokens known before step k, by dynamic programming.

    That sum is the expected NLL of the sampler's path; the excess over the data's entropy bounds its KL (the
    information profile of arXiv:2510.25544).

    Args:
        losses: h(m) for m = 0 .. L - 1, of `reveal_losses`.
        steps: number of steps, at most L of them reveal something.
    """
    length = len(losses)
    best = torch.full((steps + 1, length + 1), torch.inf, dtype=torch.float64)
    back = torch.zeros(steps + 1, length + 1, dtype=torch.int64)
    best[0, 0] = 0.0
    for k in range(1, steps + 1):
        for m in range(length + 1):
            known = torch.arange(m + 1)
            cost = best[k - 1, : m + 1] + (m - known) * torch.cat([losses, losses[-1:]])[: m + 1]
            best[k, m], back[k, m] = cost.min(0)
    counts, m = [], length
    for k in range(steps, 0, -1):
        counts.append(m - int(back[k, m]))
        m = int(back[k, m])
    return counts[::-1]


def optimal_count_table(
    model: Model, process: MaskedProcess, ids: Tensor, nfe: int, generator: torch.Generator | None = None
) -> DiscreteTable:
    """Fixed-count sampling with `optimal_counts` measured on ``ids`` (n, L)."""
    losses = reveal_losses(model, process, ids, generator, stride=max(1, ids.shape[1] // 16))
    plain = DiscreteTable.plain("masked", "fixed_count", nfe)
    return DiscreteTable("masked", "fixed_count", plain.times, count=tuple(optimal_counts(losses, nfe)))


def jump_grid(
    model: Model, process: Process, ids: Tensor, steps: int, generator: torch.Generator | None = None, fine: int = 48
) -> list[float]:
    """Times 1 .. 0 of ``steps`` steps that minimise a bound on the path KL of a frozen model (after arXiv:2410.07761).

    The bound of a step from t to s is the expected KL rate between the reverse rates at the times in between and those of the
    model's answer at t, over forward trajectories from ``ids`` (n, L). The noise's own factors are not frozen: Tweedie steps
    integrate them exactly. The best subset of a uniform grid of ``fine`` times is found by dynamic programming, where the
    paper bisects and freezes the rates as a whole.

    Raises:
        ValueError: more steps than fine times.
    """
    if not 1 <= steps <= fine:
        raise ValueError(f"steps must be between 1 and the {fine} fine times, got {steps}")
    times = [1.0 - k / fine for k in range(fine)]
    states, answers = _trajectory(model, process, ids, times, generator)
    rates = [process.reverse_rates(probs, x, t).double() for probs, x, t in zip(answers, states, times, strict=True)]
    cost = torch.full((fine + 1, fine + 1), torch.inf, dtype=torch.float64)
    for i in range(fine):
        total = 0.0
        cost[i, i + 1] = 0.0
        for j in range(i + 1, fine):
            later = process.retime(answers[i], states[i], times[i], times[j])
            frozen = process.reverse_rates(later, states[i], times[j]).double()
            gain = torch.where(rates[j] > 0, rates[j] * (rates[j].clamp(min=1e-30) / frozen.clamp(min=1e-30)).log(), 0.0)
            still = (states[j] == states[i])[..., None]
            total += float(((gain - rates[j] + frozen) * still).sum() / len(ids)) / fine
            cost[i, j + 1] = total
    best = torch.full((steps + 1, fine + 1), torch.inf, dtype=torch.float64)
    back = torch.zeros(steps + 1, fine + 1, dtype=torch.int64)
    best[0, 0] = 0.0
    for k in range(1, steps + 1):
        best[k], back[k] = (best[k - 1][:, None] + cost).min(0)
    grid, place = [0.0], fine
    for k in range(steps, 0, -1):
        place = int(back[k, place])
        grid.append(times[place])
    return grid[::-1]


def _trajectory(
    model: Model, process: Process, ids: Tensor, times: list[float], generator: torch.Generator | None
) -> tuple[list[Tensor], list[Tensor]]:
    """States and the model's answers along forward runs, in the order of the decreasing times."""
    x, before, states, answers = ids, 0.0, [], []
    for t in reversed(times):
        keep = float(process.alpha(t) / process.alpha(before))
        noise = process.prior(tuple(x.shape), generator, device=x.device)
        x = torch.where(uniform(x.shape, x, generator) < keep, x, noise)
        before = t
        with torch.no_grad():
            answers.append(process.settle(model(x, torch.tensor(t, dtype=torch.float64)), x))
        states.append(x)
    return states[::-1], answers[::-1]

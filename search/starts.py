"""Where a search starts: every classic solver on every grid, with and without an analytic first step, best-known first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from samplers import NoiseSchedule, SolverSchedule, recipe

from .space import SearchSpace

# Solvers that diffusers has, as recipe text. The first ones of each list are what few-step benchmarks have found best.
SOLVERS = (
    "deis:order=3",
    "unipc:order=3",
    "ipndm:order=3",
    "dpmpp:order=2",
    "deis:order=2",
    "unipc:order=2",
    "dpmpp:order=3",
    "lms:order=3",
    "ipndm:order=4",
    "deis:order=2,axis=t",
    "deis:order=3,axis=t",
    "dpmpp:order=2,method=singlestep",
    "dpm:order=2",
    "unipc:order=2,variant=bh1",
    "dpm:order=3",
    "dpmpp:order=3,method=singlestep",
    "lms:order=2",
    "ipndm:order=2",
    "dpmpp:order=2,solver_type=heun",
    "lms:order=4",
    "ddim",
    "heun",
    "kdpm2",
)
GRIDS = {
    "vp": (
        "lambda",
        "trailing",
        "linspace",
        "karras",
        "exponential",
        "quadratic",
        "beta",
        "inclusive",
        "leading",
        "ays_sd",
        "ays_sdxl",
    ),
    "edm": ("karras", "lambda", "exponential", "quadratic", "beta", "linspace", "ays_svd"),
    "flow": ("trailing", "linspace", "karras", "beta", "lambda", "exponential", "quadratic"),
}


def baselines(
    noise_schedule: NoiseSchedule, nfe: int, *, sources: Sequence[str] = ("none", "zero_x0"), final_time: float = 0.0
) -> Iterator[tuple[str, SolverSchedule]]:
    """Recipe texts with their schedules, best-known combinations first; those that cannot spend ``nfe`` are left out.

    Args:
        noise_schedule: the model's.
        nfe: network evaluations.
        sources: first steps: "none", "zero_x0", "average_x0".
        final_time: only schedules that end there are given: 0 or the noise schedule's t_min.
    """
    final = "zero" if final_time == 0.0 else "sigma_min"
    grids, seen = GRIDS[noise_schedule.family], set()
    cells = [(i + j, i, j) for i in range(len(SOLVERS)) for j in range(len(grids))]
    for _, i, j in sorted(cells):  # along the diagonals: good solvers on good grids come first
        for source in sources:
            text = SOLVERS[i]
            text += ("," if ":" in text else ":") + f"grid={grids[j]},final={final},clip=none"
            text += f",afs={source}" if source != "none" else ""
            try:
                schedule = recipe(text, noise_schedule, nfe)
            except ValueError:
                continue  # a rule that needs more evaluations, or a grid of another family
            if schedule.nfe != nfe or schedule.times[-1] != final_time or schedule.digest in seen:
                continue
            seen.add(schedule.digest)
            yield text, schedule


def seeds(space: SearchSpace, limit: int | None = None, extra: Sequence[SolverSchedule] = ()) -> list[SolverSchedule]:
    """Members to evaluate before anything is proposed: ``extra`` ones adopted into the space, then the baselines."""
    out, digests = [], set()
    sources = ("none", *(s for s in ("zero_x0", "average_x0") if s in space.sources))

    def candidates() -> Iterator[SolverSchedule]:
        yield from (schedule if space.contains(schedule) else space.adopt(schedule) for schedule in extra)
        for _, schedule in baselines(space.noise_schedule, space.nfe, sources=sources, final_time=space.final_time):
            yield schedule

    for schedule in candidates():
        if limit is not None and len(out) >= limit:
            break
        if schedule.digest not in digests and space.contains(schedule):
            digests.add(schedule.digest)
            out.append(schedule)
    return out

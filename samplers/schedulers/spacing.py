"""Time grids as in-tree schedulers would choose them from their config, in the noise schedule's t.

Here rounding, offsets and shifts follow diffusers, so that a swapped solver visits the same points as the class it replaces.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config_reader import flow_shift_of
from ..noise import NoiseSchedule
from ..recipes.grids import beta_quantiles, flow_shift

STILL = 1e-9  # relative length of a step that is none, since the times of a schedule differ


def config_times(
    noise: NoiseSchedule, config: Mapping[str, Any], n: int, *, convention: str, final: str | None, mu: float | None
) -> tuple[float, ...]:
    """n evaluation times and the final one, as the config's class would place them.

    Args:
        noise: the noise schedule.
        config: the scheduler's config.
        n: evaluation times.
        convention: how ``timestep_spacing`` is meant: "exclusive" (DPM-Solver), "inclusive" (DDIM, Euler) or "distilled" (the
            training steps that LCM and TCD checkpoints were distilled on).
        final: "zero" or "sigma_min" when the recipe says so; None leaves it to the config.
        mu: dynamic shift of flow models.
    """
    if noise.family == "flow":
        return (*flow_times(config, n, mu).tolist(), 0.0)
    if noise.family == "edm":
        points = _sigma_ramp(noise.t_max, noise.t_min, n, str(config.get("sigma_schedule") or "karras"), config)
    elif noise.kind == "vp_trig":  # IPNDMScheduler's own times: sin(pi t / 2) is a squared sine of an even clock
        even = torch.linspace(1, 0, n + 1, dtype=torch.float64)[:-1]
        points = torch.asin(torch.sin(even * (math.pi / 2)) ** 2) * (2 / math.pi)
    elif (kind := _named_ramp(config)) is not None and convention != "distilled":
        ramp = _sigma_ramp(*_ramp_ends(noise, config, n, convention=convention), n, kind, config)
        points = noise.t_of_lam(-torch.log(ramp))
    else:
        points = noise.t_of_timestep(training_steps(noise, config, n, convention=convention))
    points[0] = points[0].clamp(max=noise.t_max)
    return (*points.tolist(), end_time(noise, config, float(points[-1]), convention=convention, final=final))


def end_time(noise: NoiseSchedule, config: Mapping[str, Any], last: float, *, convention: str, final: str | None) -> float:
    """Where the step from the last evaluation ends; arguments as in `config_times`, with that evaluation's time."""
    if final is None:
        ddim = convention == "inclusive" and config.get("set_alpha_to_one") is False  # DDIM's spelling of the same choice
        final = "sigma_min" if ddim else str(config.get("final_sigmas_type") or "zero")
    if final == "zero":
        return 0.0
    return min(noise.t_min, last * (1 - STILL))  # in-tree classes may evaluate at sigma_min and stay there


def training_steps(noise: NoiseSchedule, config: Mapping[str, Any], n: int, *, convention: str) -> Tensor:
    """n training steps (0-based, decreasing) by ``timestep_spacing`` (arXiv:2305.08891, table 2).

    Raises:
        ValueError: unknown spacing, or more points than training steps.
    """
    total = int(noise.parameters["num_train_timesteps"])
    if n > total:
        raise ValueError(f"num_inference_steps {n} is more than the {total} training steps of this model")
    inclusive = convention != "exclusive"
    if convention == "distilled":
        every = int(config.get("original_inference_steps") or 50)
        if n > every:
            raise ValueError(f"num_inference_steps {n} is more than the {every} steps that this model was distilled on")
        origin = torch.arange(every, 0, -1, dtype=torch.float64) * (total // every) - 1
        return origin[(torch.arange(n) * every) // n]
    spacing, offset = config.get("timestep_spacing") or "linspace", int(config.get("steps_offset") or 0)
    floor = config.get("lambda_min_clipped")
    if floor is not None and floor > -math.inf and not inclusive:
        lam = noise.lam(noise.t_of_timestep(torch.arange(total, dtype=torch.float64)))
        total -= int((lam < floor).sum())
    if spacing == "linspace":
        steps = torch.linspace(0, total - 1, n if inclusive else n + 1, dtype=torch.float64).flip(0)
        steps = steps.round() if len(steps) <= total else steps  # between the training steps where there are too few
        steps = steps if inclusive else steps[:-1]
        return steps if n > 1 or not inclusive else torch.full((1,), float(total - 1), dtype=torch.float64)
    if spacing == "leading":
        ratio = total // (n if inclusive else n + 1)
        first = 0 if inclusive else 1
        steps = (torch.arange(first, first + n, dtype=torch.float64) * ratio).flip(0) + offset
        return steps.clamp(max=total - 1)
    if spacing == "trailing":
        return (total - torch.arange(n, dtype=torch.float64) * (total / n)).round() - 1
    raise ValueError(f"unknown timestep_spacing {spacing!r}; known: linspace, leading, trailing")


def _ramp_ends(noise: NoiseSchedule, config: Mapping[str, Any], n: int, *, convention: str) -> tuple[float, float]:
    """Highest and lowest sigma / alpha of a named grid: of all training steps, or (Euler's kind) of those spacing picks."""
    ends = [1.0, noise.t_min]
    if convention == "inclusive":
        ends = noise.t_of_timestep(training_steps(noise, config, n, convention=convention)[[0, -1]]).tolist()
    high, low = (float(torch.exp(-noise.lam(t))) for t in ends)
    top, bottom = (float(torch.exp(-noise.lam(t))) for t in (1.0, noise.t_min))
    for name in ("sigma_max", "sigma_min"):
        value = config.get(name)
        if value is not None and not bottom * (1 - 1e-6) <= value <= top * (1 + 1e-6):
            raise ValueError(f"{name} {value} lies outside the noise levels {bottom:.4g} to {top:.4g} of this model's training")
    largest, smallest = config.get("sigma_max"), config.get("sigma_min")
    return high if largest is None else float(largest), low if smallest is None else float(smallest)


def _named_ramp(config: Mapping[str, Any]) -> str | None:
    flags = (("use_karras_sigmas", "karras"), ("use_lu_lambdas", "exponential"), ("use_exponential_sigmas", "exponential"))
    return next((kind for flag, kind in (*flags, ("use_beta_sigmas", "beta")) if config.get(flag)), None)


def _sigma_ramp(high: float, low: float, n: int, kind: str, config: Mapping[str, Any]) -> Tensor:
    """n noise levels from ``high`` to ``low``, both included."""
    if kind == "beta":
        return low + (high - low) * beta_quantiles(n)
    if kind == "exponential":
        return torch.linspace(math.log(high), math.log(low), n, dtype=torch.float64).exp()
    rho = float(config.get("rho") or 7.0)
    return torch.linspace(high ** (1 / rho), low ** (1 / rho), n, dtype=torch.float64) ** rho


def dynamic_shift(config: Mapping[str, Any], mu: float) -> float:
    """The shift that ``mu`` means under the config's ``time_shift_type``."""
    return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu


def flow_times(config: Mapping[str, Any], n: int, mu: float | None, sigmas: Sequence[float] | None = None) -> Tensor:
    """n evaluation times of a flow model, shifted as its config says.

    Without ``sigmas`` the unshifted times are those of the config's class: flow-match schedulers run linearly between the
    shifted ends of the training range, which shifts the low end twice (diffusers issue 13243); UniPC and the DPM-Solver-like
    ones stop one step short of the clean end.

    Args:
        config: the scheduler's config.
        n: evaluation times.
        mu: dynamic shift; required by configs with ``use_dynamic_shifting``.
        sigmas: the pipeline's own unshifted times instead.

    Raises:
        ValueError: dynamic shifting without ``mu``.
    """
    total = int(config.get("num_train_timesteps") or 1000)
    shift, dynamic = flow_shift_of(config), bool(config.get("use_dynamic_shifting"))
    if dynamic and mu is None:
        raise ValueError("this model's config uses dynamic shifting: pass mu to set_timesteps, as its pipeline does")
    if sigmas is not None:
        t = torch.as_tensor(sigmas, dtype=torch.float64)
    elif config.get("use_flow_sigmas") and "predict_x0" in config:  # UniPC; its relatives start one training step lower
        t = torch.linspace(1, 1 / total, n + 1, dtype=torch.float64)[:-1]
    elif config.get("use_flow_sigmas"):
        t = torch.linspace(1 - 1 / total, 0, n + 1, dtype=torch.float64)[:-1]
    else:
        low = torch.tensor(1 / total, dtype=torch.float64)
        low = low if dynamic else flow_shift(low, shift)
        t = torch.linspace(1.0, low.item(), n, dtype=torch.float64)
    if dynamic:
        assert mu is not None
        shift = dynamic_shift(config, mu)
    t = flow_shift(t, shift)
    terminal = config.get("shift_terminal")
    if terminal:
        t = 1 - (1 - t) * ((1 - terminal) / (1 - t[-1]))
    if (kind := _named_ramp(config)) is not None:
        t = _sigma_ramp(float(t[0]), float(t[-1]), n, kind, config)
    return t.clamp(max=1.0)

"""What a diffusers scheduler's config says about the model: noise schedule, prediction type, preconditioning.

Configs come from disk (with ``_class_name``) or from memory (often without, and with every default spelled out), and the same
key means different things in different classes; so the family is decided here, once, from the raw mapping.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .noise import NoiseSchedule
from .parametrization import EPSILON, FLOW_PREDICTION, REVERSED_FLOW_PREDICTION, V_PREDICTION, check_parametrization

FLOW_CLASSES = ("FlowMatch", "FlowMap", "LTXEulerAncestralRF", "MiniMaxH3")
FLOW_KEYS = {"shift", "use_dynamic_shifting", "base_shift", "invert_sigmas"}
VP_KEYS = {"beta_start", "beta_end", "beta_schedule"}
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
TRIG = "trig"  # our own name for the continuous schedule that IPNDMScheduler has instead of betas

# Keys that mark classes whose models are not sampled by a plain probability-flow ODE in one of the three families.
_UNSUPPORTED = {
    "mask_token_id": "token models have their own scheduler",
    "num_vec_classes": "token models have their own scheduler",
    "block_length": "token models have their own scheduler",
    "corrector_selection": "token models have their own scheduler",
    "entropy_bound": "token models have their own scheduler",
    "clip_denoised": "consistency models are not sampled by an ODE solver",
    "s_churn": "Karras VE configs carry no preconditioning to read the network with",
    "snr": "score-SDE VE configs carry no preconditioning to read the network with",
    "sampling_eps": "score-SDE configs carry no prediction type to read the network with",
    "scaler": "Wuerstchen's continuous cosine schedule is not supported",
    "n_grid": "pi-flow models predict a policy rather than a velocity",
    "stages": "Helios samples in stages of different resolutions",
    "jump_length": "RePaint moves back and forth in time",
}


@dataclass(frozen=True)
class ModelConfig:
    """A scheduler config, understood.

    Attributes:
        family: "vp", "edm" or "flow".
        prediction_type: one of `samplers.parametrization.PARAMETRIZATIONS`.
        sigma_data: EDM preconditioning scale, or None.
        values: the config's own values, without bookkeeping keys.
    """

    family: str
    prediction_type: str
    sigma_data: float | None
    values: Mapping[str, Any]

    def noise_schedule(self, *, exact_end: bool = False) -> NoiseSchedule:
        """The noise schedule of the family with the config's parameters; ``exact_end`` as in `NoiseSchedule.vp_discrete`."""
        get = self.values.get
        if self.family == "edm":
            clock = str(get("clock") or "log")
            return NoiseSchedule.edm(_or(get("sigma_min"), 0.002), _or(get("sigma_max"), 80.0), clock=clock)
        if self.family == "flow":
            return NoiseSchedule.flow(flow_shift_of(self.values), inverted=bool(get("invert_sigmas")))
        if get("beta_schedule") == TRIG:
            return NoiseSchedule.vp_trig()
        return NoiseSchedule.vp_discrete(alphas_cumprod_of(self.values), exact_end=exact_end)


def _or(value: Any, default: float) -> float:
    return float(default if value is None else value)


def flow_shift_of(values: Mapping[str, Any]) -> float:
    """The static shift: ``flow_shift`` in configs of the DPM-Solver kind, ``shift`` in those of the flow-match kind."""
    if values.get("use_flow_sigmas"):
        return _or(values.get("flow_shift"), 1.0)
    return _or(values.get("shift"), 1.0)


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """Understand a scheduler config.

    Raises:
        ValueError: the config belongs to no supported family, or a value is unknown; the message names it.
    """
    values = {key: value for key, value in config.items() if not key.startswith("_")}
    name = str(config.get("_class_name") or "")
    label = name or "this scheduler config"
    for key, reason in _UNSUPPORTED.items():
        if key in values or (key == "jump_length" and name == "RePaintScheduler"):
            raise ValueError(f"{label} is not supported: {reason}")
    if values.get("prediction_type") == "trigflow":
        raise ValueError(f"{label} is not supported: TrigFlow models are consistency models")
    if set(values) == {"num_train_timesteps", "sigma_data"}:
        raise ValueError(f"{label} is not supported: consistency models are not sampled by an ODE solver")
    if "eta" in values and "beta_start" in values and "prediction_type" not in values:
        raise ValueError(f"{label} is not supported: RePaint moves back and forth in time")
    if name == "IPNDMScheduler" or set(values) == {"num_train_timesteps", "trained_betas"}:
        return _trig_config(label, values)
    values |= _continuous(label, values)
    family = _family(name, values)
    if family is None:
        raise ValueError(
            f"{label} names no noise schedule that is known here: expected betas (variance preserving), sigma_data (EDM) or "
            f"shift (flow); it has {', '.join(sorted(values)) or 'no keys'}"
        )
    default = FLOW_PREDICTION if family == "flow" else EPSILON
    kind = check_parametrization(values.get("prediction_type") or default)
    if family == "flow" and "use_flow_sigmas" not in values and "family" not in values:
        kind = REVERSED_FLOW_PREDICTION if values.get("invert_sigmas") else FLOW_PREDICTION
    if family == "edm" and "clock" not in values and _is_cosine(name, values):
        values["clock"] = "atan"
    sigma_data = _or(values.get("sigma_data"), 0.5) if family == "edm" else None
    return ModelConfig(family, kind, sigma_data, values)


def _continuous(label: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """EulerDiscreteScheduler's continuous v-prediction (Stable Video Diffusion): EDM with sigma_data 1, whatever its betas."""
    if "family" in values or values.get("timestep_type") != "continuous" or values.get("prediction_type") != V_PREDICTION:
        return {}  # read before, or of another kind
    kinds = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential"}
    kind = next((kind for flag, kind in kinds.items() if values.get(flag)), None)
    if kind is None or values.get("sigma_min") is None or values.get("sigma_max") is None:
        raise ValueError(
            f"{label} has timestep_type='continuous', whose noise levels are read from sigma_min, sigma_max and "
            "use_karras_sigmas or use_exponential_sigmas: set them"
        )
    return {"family": "edm", "sigma_data": 1.0, "sigma_schedule": kind, "clock": "log"}


def _trig_config(label: str, values: dict[str, Any]) -> ModelConfig:
    """IPNDMScheduler's (Dance Diffusion): v-prediction on the quarter circle, with no key that says so."""
    if values.get("trained_betas") is not None:
        raise ValueError(f"{label} is not supported with trained_betas: there they are noise levels of single steps")
    return ModelConfig("vp", V_PREDICTION, None, values | {"beta_schedule": TRIG})


def _is_cosine(name: str, values: Mapping[str, Any]) -> bool:
    """Stable Audio's scheduler: EDM preconditioning, but its networks are told arctan(sigma)."""
    return name.startswith("Cosine") or ("solver_order" in values and "algorithm_type" not in values and "family" not in values)


def _family(name: str, values: Mapping[str, Any]) -> str | None:
    if (family := values.get("family")) is not None:
        if family not in ("vp", "edm", "flow"):
            raise ValueError(f"unknown family {family!r}; known: vp, edm, flow")
        return str(family)
    if name.startswith(FLOW_CLASSES) or values.get("use_flow_sigmas") or values.get("prediction_type") == FLOW_PREDICTION:
        return "flow"
    if name.startswith(("EDM", "Cosine")) or ("sigma_data" in values and "sigma_schedule" in values):
        return "edm"
    if VP_KEYS & set(values) or values.get("trained_betas") is not None:
        return "vp"
    if FLOW_KEYS & set(values) or set(values) == {"num_train_timesteps", "eta", "s_noise"}:
        return "flow"
    return None


def betas_of(values: Mapping[str, Any]) -> Tensor:
    """The training betas (N,) float32: in the precision the checkpoints were trained and are sampled with.

    Raises:
        ValueError: unknown ``beta_schedule``.
    """
    trained = values.get("trained_betas")
    if trained is not None:
        return torch.as_tensor(trained, dtype=torch.float32)
    n, kind = int(values.get("num_train_timesteps") or 1000), values.get("beta_schedule") or "linear"
    start, end = _or(values.get("beta_start"), 1e-4), _or(values.get("beta_end"), 0.02)
    if kind == "linear":
        return torch.linspace(start, end, n, dtype=torch.float32)
    if kind == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, n, dtype=torch.float32) ** 2
    if kind == "sigmoid":
        return torch.sigmoid(torch.linspace(-6, 6, n, dtype=torch.float32)) * (end - start) + start
    if kind == "squaredcos_cap_v2":
        bars = [math.cos((i / n + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(n + 1)]
        return torch.tensor([min(1 - b / a, 0.999) for a, b in pairwise(bars)], dtype=torch.float32)
    raise ValueError(f"unknown beta_schedule {kind!r}; known: {', '.join(BETA_SCHEDULES)}")


def alphas_cumprod_of(values: Mapping[str, Any]) -> Tensor:
    """The cumulative products (N,) of 1 - beta, computed in float32, with the config's rescaling to zero terminal SNR."""
    bars = torch.cumprod(1.0 - betas_of(values), dim=0)
    scale = values.get("snr_shift_scale")
    if scale is not None:  # CogVideoX, arXiv:2408.06072
        bars = bars / (scale + (1 - scale) * bars)
    if values.get("rescale_betas_zero_snr"):
        # Lin et al. 2024, arXiv:2305.08891, algorithm 1: shift sqrt(alpha bar) so that it ends at 0 and starts where it did.
        root = bars.sqrt()
        root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        bars = root.square()
        bars[-1] = 2**-24  # as in-tree
    return bars

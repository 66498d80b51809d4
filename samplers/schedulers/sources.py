"""Where a scheduler's schedule and tensors come from: text, files, shipped names."""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..config_reader import TRIG, ModelConfig, flow_shift_of, read_config
from ..recipes import ALIASES, RECIPES, canonical
from ..statistics import EmpiricalStatistics
from ..strategy import SolverSchedule, shipped_schedules

_NEVER_NONE = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "rescale_betas_zero_snr",
    "clip_sample",
    "thresholding",
)


def resolve_schedule(source: str | Path | Mapping[str, Any] | SolverSchedule) -> str | dict[str, Any]:
    """Recipe text as it is; a file, a shipped name or a schedule as its content, so that saved pipelines carry it.

    Raises:
        ValueError: none of these; the message lists what is known.
    """
    if isinstance(source, SolverSchedule):
        return source.to_dict()
    if isinstance(source, Mapping):
        return dict(source)
    if not isinstance(source, str | Path):
        raise ValueError(f"schedule must be recipe text, a path, a name, a dict or a SolverSchedule, got {source!r}")
    text = str(source)
    if canonical(text) is not None:
        return text
    if Path(source).is_file() or text in shipped_schedules():
        return SolverSchedule.load(source).to_dict()
    known, shipped = ", ".join([*RECIPES, *ALIASES]), ", ".join(shipped_schedules()) or "none"
    raise ValueError(f"unknown schedule {text!r}: no recipe ({known}), no file, no shipped schedule ({shipped})")


def load_mean(path: str | Path) -> Tensor:
    """The one tensor in a safetensors file, float32.

    Raises:
        ValueError: it holds none or several.
    """
    tensors = load_file(path)
    if len(tensors) != 1:
        raise ValueError(f"{path}: expected one tensor, the data's mean, found {', '.join(sorted(tensors)) or 'none'}")
    return next(iter(tensors.values())).to(torch.float32)


def load_tensors(first_x0: str | Path | None, statistics: str | Path | None) -> dict[str, Any]:
    """What a config names by path, as arguments of `samplers.Tableau.build`.

    Raises:
        FileNotFoundError: a file is gone; the message says which argument names it.
        ValueError: a file holds something else.
    """
    for name, path in (("first_x0", first_x0), ("statistics", statistics)):
        if path is not None and not Path(path).is_file():
            raise FileNotFoundError(
                f"{name}: no file {path}. A scheduler's config holds the path, not the content: put the file back, or pass "
                f"{name}=NEW_PATH (None where the schedule does not use it) to from_config or from_pretrained"
            )
    return {
        "first_x0": None if first_x0 is None else load_mean(first_x0),
        "statistics": None if statistics is None else EmpiricalStatistics.load(statistics),
    }


def split_config(config: Mapping[str, Any] | None, known: Set[str]) -> tuple[ModelConfig, dict[str, Any], dict[str, Any]]:
    """What another scheduler's config says: the model, the values for our own keys, and the rest.

    Raises:
        ValueError: no config, or a model of no supported kind.
    """
    if config is None:
        raise ValueError("from_config needs a scheduler config; use SolverScheduler(...) to build from values")
    raw = dict(config)
    implied = raw.pop("_use_default_values", ())
    if "family" in raw:  # once ours: what a class in between has filled in says nothing about the model
        raw = {key: value for key, value in raw.items() if key not in implied}
    model = read_config(raw)
    raw |= {"family": model.family, "prediction_type": model.prediction_type}
    if model.family == "flow":
        raw["shift"] = flow_shift_of(raw)
    if model.family == "edm":
        raw |= {key: model.values[key] for key in ("sigma_data", "sigma_schedule") if key in model.values}
        raw["clock"] = model.values.get("clock", "log")
    if model.family == "vp" and model.values.get("beta_schedule") == TRIG:
        raw["beta_schedule"] = TRIG
    mine = {key: value for key, value in raw.items() if key in known and not (value is None and key in _NEVER_NONE)}
    foreign = {key: value for key, value in raw.items() if key not in known}
    if "_class_name" in foreign:
        foreign["_class_name"] = "SolverScheduler"
    return model, mine, foreign

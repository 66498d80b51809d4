"""A distillation run as data: one JSON file says the model, the target, what to learn and how hard to try."""

from __future__ import annotations

from pathlib import Path

import msgspec
import torch
from torch import Tensor

from samplers.discrete import (
    MarkovModel,
    MaskedProcess,
    Model,
    Process,
    TabularModel,
    UniformProcess,
    countdown_chain,
    parity_law,
    random_chain,
    random_mixture,
    sudoku_model,
)

from .fit import FitSettings
from .target import ENUMERABLE, Teacher

LAWS = ("markov", "countdown", "mixture", "parity", "sudoku")


class LawConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A known law instead of a network: one of ``LAWS``."""

    name: str
    process: str = "uniform"
    vocab: int = 3
    length: int = 5
    seed: int = 1


class TeacherConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The many-step sampler of a "teacher" target, as in `Teacher`."""

    nfe: int | None = None
    transition: str | None = None
    samples: int = 8000
    seed: int = 1


class DistillConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One run. ``model`` is a token model (shipped name or folder), or ``law`` names a known law.

    ``target`` is "teacher", "law" (of a known law), "digits" (the training digits of the digit models), or a file:
    ``.safetensors`` with ``ids`` (n, L), or ``.txt``, cut into windows with the model's symbols. ``compare`` are the plain
    transitions of the report.
    """

    nfe: list[int]
    model: str | None = None
    law: LawConfig | None = None
    knobs: list[str] | str = "auto"
    base: str | None = None
    objective: str = "auto"
    target: str = "teacher"
    seed: int = 0
    budget: int | None = None
    samples: int = 1500
    judged: int = 4000
    batch: int = 500
    relax: float = 0.0
    holdout: list[str] | None = None
    teacher: TeacherConfig = TeacherConfig()
    compare: list[str] = []


class Problem(msgspec.Struct, frozen=True):
    """What a config means: the model, its process and length, and the target."""

    model: Model
    process: Process
    seq_len: int
    target: Tensor | str


def read_config(path: Path) -> DistillConfig:
    """Read a config.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, unknown or missing fields, wrong types; the message says which.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no distill config at {path}")
    try:
        config = msgspec.json.decode(path.read_bytes(), type=DistillConfig)
    except msgspec.DecodeError as error:  # also what ValidationError derives from
        raise ValueError(f"{path}: {error}") from None
    check_config(config)
    return config


def check_config(config: DistillConfig) -> None:
    """Refuse a config that names no model, or no network evaluations."""
    if (config.model is None) == (config.law is None):
        raise ValueError("a distill config names either a model or a law")
    if not config.nfe or min(config.nfe) < 1 or len(set(config.nfe)) < len(config.nfe):
        raise ValueError(f"nfe must list different numbers of at least 1, got {config.nfe}")


def settings_of(config: DistillConfig, folder: Path | None, device: str) -> FitSettings:
    """The config's effort as settings."""
    teacher = Teacher(config.teacher.nfe, config.teacher.transition, config.teacher.samples, config.teacher.seed)
    return FitSettings(
        budget=config.budget,
        samples=config.samples,
        judged=config.judged,
        batch=config.batch,
        teacher=teacher,
        relax=config.relax,
        holdout=None if config.holdout is None else tuple(config.holdout),
        folder=folder,
        device=device,
    )


def problem_of(config: DistillConfig, device: str = "cpu") -> Problem:
    """Load the model and the target.

    Raises:
        ValueError: unknown names, or a target that does not belong to the model.
        FileNotFoundError: no such model folder or target file.
    """
    if config.law is not None:
        return _known_law(config.law, config.target, config.teacher.samples)
    from samplers.reference import load_tokens

    model = load_tokens(config.model)
    model.network.to(device)
    return Problem(model, model.process, model.seq_len, _target(config.target, model))


def _known_law(law: LawConfig, target: str, samples: int) -> Problem:
    if law.name not in LAWS:
        raise ValueError(f"unknown law {law.name!r}; known: {', '.join(LAWS)}")
    if law.process not in ("masked", "uniform"):
        raise ValueError(f"unknown process {law.process!r}; known: masked, uniform")
    if target not in ("law", "teacher"):
        raise ValueError(f"the target of a known law is 'law' or 'teacher', got {target!r}")
    vocab = {"parity": 2, "sudoku": 4}.get(law.name, law.vocab)
    process = (MaskedProcess if law.process == "masked" else UniformProcess)(vocab)
    length = 16 if law.name == "sudoku" else law.length
    generator = torch.Generator().manual_seed(law.seed)
    if law.name == "parity":
        table = parity_law(length)
        return Problem(TabularModel(table, process), process, length, "teacher" if target == "teacher" else table)
    if law.name == "sudoku":
        model: Model = sudoku_model(process)
        return Problem(model, process, length, "teacher" if target == "teacher" else model.sample(samples, generator))
    if law.name == "mixture":
        model = random_mixture(process, length, seed=law.seed)
    else:
        model = random_chain(process, seed=law.seed) if law.name == "markov" else countdown_chain(process)
    if target == "teacher":
        return Problem(model, process, length, "teacher")
    if process.states**length <= ENUMERABLE:
        return Problem(model, process, length, model.law(length) if isinstance(model, MarkovModel) else model.law())
    ids = model.sample(samples, length, generator) if isinstance(model, MarkovModel) else model.sample(samples, generator)
    return Problem(model, process, length, ids)


def _target(target: str, model: object) -> Tensor | str:
    """Ids of a network's target."""
    if target == "teacher":
        return target
    if target == "digits":
        from samplers.reference import binary_digits

        return binary_digits("train")
    path = Path(target)
    if not path.is_file():
        raise FileNotFoundError(f"target {target!r} is neither 'teacher', 'digits' nor a file")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        tensors = load_file(path)
        if "ids" not in tensors:
            raise ValueError(f"{path} has no tensor 'ids'; it has {', '.join(tensors)}")
        return tensors["ids"].long()
    if path.suffix != ".txt":
        raise ValueError(f"{path}: targets are .safetensors or .txt files")
    symbols = model.config.get("symbols")
    if not symbols:
        raise ValueError(f"{path} is text, but the model's config has no symbols")
    lookup = {symbol: i for i, symbol in enumerate(symbols)}
    text = path.read_text(encoding="utf-8")
    if unknown := sorted(set(text) - set(symbols)):
        raise ValueError(f"{path} has characters the model does not know: {''.join(unknown[:10])!r}")
    ids = torch.tensor([lookup[c] for c in text[: len(text) // model.seq_len * model.seq_len]])
    return ids.view(-1, model.seq_len)

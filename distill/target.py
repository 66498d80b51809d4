"""What a sampler is fitted to: a known law, a data set, or samples of a many-step teacher."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from samplers.discrete import DiscreteTable, Model, Process, push_table, sample_discrete

if TYPE_CHECKING:
    from accelerate import PartialState

ENUMERABLE = 4096  # states S^L up to which laws are pushed exactly
CHUNK = 500  # teacher samples per file


@dataclass(frozen=True)
class Target:
    """The law to reach, in the form it is known in.

    Attributes:
        kind: "law", "data" or "teacher".
        law: (V,) * L, or None.
        fit: ids (n, L) the objective compares with, or None.
        held_out: ids (m, L) that only judge, or None.
    """

    kind: str
    law: Tensor | None
    fit: Tensor | None
    held_out: Tensor | None


@dataclass(frozen=True)
class Teacher:
    """A many-step sampler of the frozen model: all that "teacher" targets need.

    Attributes:
        nfe: network evaluations per sample; None: 256 for uniform noise, one per token (exact) for masked up to 256.
        transition: its transition; None: Tweedie for uniform noise, fixed counts for masked.
        samples: how many sequences.
        seed: of chunk c is ``seed * 100003 + c``.
    """

    nfe: int | None = None
    transition: str | None = None
    samples: int = 8000
    seed: int = 1

    def table(self, process: str, seq_len: int) -> DiscreteTable:
        """Its table."""
        masked = process == "masked"
        nfe = self.nfe or (min(256, seq_len) if masked else 256)
        return DiscreteTable.plain(process, self.transition or ("fixed_count" if masked else "tweedie"), nfe)


def enumerable(process: Process, seq_len: int) -> bool:
    """Whether exact objectives are offered."""
    return process.states**seq_len <= ENUMERABLE


def model_digest(model: Model, process: Process, seq_len: int) -> str:
    """Short fingerprint of a model by its answers to fixed questions, rounded to two digits."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randint(process.states, (4, seq_len), generator=generator)
    with torch.no_grad():
        answers = [model(x.to(_place(model)), torch.tensor(t, dtype=torch.float64)) for t in (0.3, 0.8)]
    rounded = torch.stack(answers).float().cpu().mul(100).round().to(torch.int16)
    text = json.dumps(process.to_dict(), sort_keys=True).encode() + rounded.numpy().tobytes()
    return hashlib.sha256(text).hexdigest()[:12]


def _place(model: Model) -> torch.device:
    return torch.device(getattr(model, "device", "cpu"))


def resolve_target(
    target: Tensor | str,
    model: Model,
    process: Process,
    seq_len: int,
    *,
    exact: bool,
    teacher: Teacher,
    folder: Path | None = None,
    batch: int = 500,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Target:
    """Read what the caller gave.

    Args:
        target: law (V,) * L of floating point, ids (n, L) of integers, or "teacher".
        model: as in `sample_discrete`.
        process: the noising process.
        seq_len: number of sites L.
        exact: whether the objective needs a law.
        teacher: how the teacher samples.
        folder: where its samples are kept.
        batch: sequences per model call.
        device: where sampling runs.
        progress: called with (chunks done, chunks).

    Raises:
        ValueError: naming what was given and what is allowed.
    """
    vocab = process.vocab
    if isinstance(target, str):
        if target != "teacher":
            raise ValueError(f"target must be a law, ids or 'teacher', got {target!r}")
        if exact:
            with torch.no_grad():
                return Target("teacher", push_table(model, process, seq_len, teacher.table(process.name, seq_len)), None, None)
        ids = teacher_samples(model, process, seq_len, teacher, folder=folder, batch=batch, device=device, progress=progress)
        return _split("teacher", ids)
    if target.is_floating_point():
        if tuple(target.shape) != (vocab,) * seq_len:
            raise ValueError(f"a law for this process has shape ({vocab},) * {seq_len}, got {tuple(target.shape)}")
        if bool((target < 0).any()) or abs(float(target.sum()) - 1.0) > 1e-5:
            raise ValueError(f"a law is non-negative and sums to one; this one sums to {float(target.sum()):.6g}")
        law = target.double()
        if exact:
            return Target("law", law, None, None)
        generator = torch.Generator().manual_seed(teacher.seed)
        picks = torch.multinomial(law.flatten(), 2 * teacher.samples, replacement=True, generator=generator)
        ids = torch.stack(torch.unravel_index(picks, law.shape), dim=1)
        return Target("law", None, ids[: teacher.samples], ids[teacher.samples :])
    if target.ndim != 2 or target.shape[1] != seq_len or len(target) < 20:
        raise ValueError(f"target ids must be (n, {seq_len}) with n >= 20, got {tuple(target.shape)}")
    if int(target.min()) < 0 or int(target.max()) >= vocab:
        raise ValueError(f"target ids must be 0 .. {vocab - 1}, got {int(target.min())} .. {int(target.max())}")
    split = _split("data", target.cpu().long())
    return Target("data", histogram(split.fit, vocab), split.fit, split.held_out) if exact else split


def _split(kind: str, ids: Tensor) -> Target:
    """Two thirds to fit, every third sequence to judge."""
    judge = torch.arange(len(ids)) % 3 == 2
    return Target(kind, None, ids[~judge], ids[judge])


def histogram(ids: Tensor, vocab: int) -> Tensor:
    """Empirical law (V,) * L of ids (n, L)."""
    length = ids.shape[1]
    place = vocab ** torch.arange(length - 1, -1, -1)
    counts = torch.bincount((ids * place).sum(-1), minlength=vocab**length).double()
    return (counts / len(ids)).view((vocab,) * length)


def teacher_samples(
    model: Model,
    process: Process,
    seq_len: int,
    teacher: Teacher,
    *,
    folder: Path | None = None,
    batch: int = 500,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Ids (n, L) of the teacher, on the CPU; chunks already in ``folder`` are read, not drawn again.

    Under ``accelerate launch`` the processes share the chunks, which then need a folder.

    Raises:
        ValueError: several processes and no folder.
    """
    table, state = teacher.table(process.name, seq_len), launched()
    if state.num_processes > 1 and folder is None:
        raise ValueError("several processes share teacher samples through a folder: name one")
    key = [table.to_dict(), process.to_dict(), teacher.seed, model_digest(model, process, seq_len)]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    count, chunks = -(-teacher.samples // CHUNK), []
    for index in range(count):
        path = None if folder is None else folder / f"teacher-{digest}-{index:04d}.safetensors"
        if path is not None and path.is_file():
            chunks.append(load_file(path)["ids"])
        elif index % state.num_processes == state.process_index:
            generator = torch.Generator().manual_seed(teacher.seed * 100_003 + index)
            ids = draw_many(model, process, CHUNK, seq_len, table, generator, batch, device)
            chunks.append(ids)
            if path is not None:
                partial = path.with_suffix(".part")
                save_file({"ids": ids.contiguous()}, partial)
                partial.replace(path)
        if progress:
            progress(index + 1, count)
    state.wait_for_everyone()
    if state.num_processes > 1:
        chunks = [load_file(folder / f"teacher-{digest}-{index:04d}.safetensors")["ids"] for index in range(count)]
    return torch.cat(chunks)[: teacher.samples]


def launched() -> PartialState:
    """The processes of an ``accelerate launch`` or ``torchrun``: this one alone if there was none.

    Without an accelerator they must be told to talk through the CPU, or each believes it is alone.
    """
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available())


def draw_many(
    model: Model,
    process: Process,
    n: int,
    seq_len: int,
    table: DiscreteTable,
    generator: torch.Generator,
    batch: int = 500,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Ids (n, L) of a table on the CPU, at most ``batch`` at a time."""
    parts, left = [], n
    with torch.no_grad():
        while left > 0:
            size = min(batch, left)
            shape = (size, seq_len)
            parts.append(sample_discrete(model, process, shape, table=table, generator=generator, device=device).cpu())
            left -= size
    return torch.cat(parts)

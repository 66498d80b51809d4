"""The solution that candidates are compared with: many steps from the same noises, kept on disk with a checksum."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from samplers import NoiseSchedule, recipe, sample
from samplers.engine import Denoiser

TEACHER = "dpmpp:order=3,taylor=true,grid=lambda,clip=none"


@dataclass(frozen=True)
class Teacher:
    """A converged solution.

    Attributes:
        solution: (B, *E) at the final time, in x_T's dtype.
        error: RMSE between this solution and the one with half the evaluations: how far from converged it can be, but for
            the first-order step from t_min to 0, which every solution shares.
        nfe: network evaluations per sample that were spent, both solutions together.
    """

    solution: Tensor
    error: float
    nfe: int


def teacher(
    denoiser: Denoiser,
    noise_schedule: NoiseSchedule,
    x_T: Tensor,
    *,
    nfe: int = 200,
    final_time: float = 0.0,
    batch_size: int | None = None,
    cache: str | Path | None = None,
    model: str = "",
) -> Teacher:
    """Solve with ``nfe`` and with ``nfe // 2`` evaluations of a third-order solver on an even grid in lambda.

    Args:
        denoiser: ``(x, t) -> x0``.
        noise_schedule: the denoiser's.
        x_T: (B, *E) starting noises.
        nfe: evaluations of the better solution, at least 20.
        final_time: 0, or the noise schedule's t_min.
        batch_size: samples at once; all when None.
        cache: folder where the solution is kept and found again; a damaged file is refused.
        model: what identifies the denoiser in the cache (a name or a hash); required with ``cache``.

    Raises:
        ValueError: settings that do not fit, or a cached file whose content does not match its checksum.
    """
    if nfe < 20:
        raise ValueError(f"reference_nfe must be at least 20 to stand for the converged solution, got {nfe}")
    if final_time not in (0.0, noise_schedule.t_min):
        raise ValueError(f"final_time must be 0 or {noise_schedule.t_min:g}, got {final_time}")
    path = None
    if cache is not None:
        if not model:
            raise ValueError("a cached reference needs `model`, the name or hash of what computed it")
        key = {"model": model, "teacher": TEACHER, "nfe": nfe, "final": final_time, "noise": noise_name(noise_schedule)}
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode() + tensor_bytes(x_T)).hexdigest()[:16]
        path = Path(cache) / f"reference-{name}.safetensors"
        if path.is_file():
            return _load(path)
    solutions = [_solve(denoiser, noise_schedule, x_T, n, final_time, batch_size) for n in (nfe, nfe // 2)]
    error = (solutions[0].double() - solutions[1].double()).square().mean().sqrt().item()
    found = Teacher(solutions[0], error, nfe + nfe // 2)
    if path is not None:
        _save(path, found)
    return found


def _solve(
    denoiser: Denoiser, noise: NoiseSchedule, x_T: Tensor, nfe: int, final_time: float, batch_size: int | None
) -> Tensor:
    final = "zero" if final_time == 0.0 else "sigma_min"
    schedule = recipe(f"{TEACHER},final={final}", noise, nfe)
    with torch.no_grad():
        parts = torch.arange(len(x_T)).split(batch_size or max(len(x_T), 1))
        return torch.cat([sample(of_rows(denoiser, rows), x_T[rows], schedule, noise) for rows in parts])


def of_rows(denoiser: Denoiser, rows: Tensor) -> Denoiser:
    """The denoiser of some rows of the noises: a pipeline's rows each have their own condition."""
    select = getattr(denoiser, "for_rows", None)
    return denoiser if select is None else select(rows)


def tensor_bytes(x: Tensor) -> bytes:
    """Shape, dtype and content."""
    return f"{tuple(x.shape)}{x.dtype}".encode() + x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def noise_name(noise: NoiseSchedule) -> str:
    """What identifies a noise schedule."""
    table = "" if noise.table is None else hashlib.sha256(tensor_bytes(noise.table)).hexdigest()[:16]
    return json.dumps([noise.kind, noise.t_max, noise.t_min, dict(noise.parameters), table], sort_keys=True)


def _save(path: Path, found: Teacher) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")  # workers may compute the same reference at once
    checksum = hashlib.sha256(tensor_bytes(found.solution)).hexdigest()
    facts = {"error": repr(found.error), "nfe": str(found.nfe), "sha256": checksum}
    save_file({"solution": found.solution.contiguous().cpu()}, partial, metadata=facts)
    partial.replace(path)


def _load(path: Path) -> Teacher:
    try:
        with safe_open(path, framework="pt") as file:
            facts, solution = file.metadata(), file.get_tensor("solution")
        intact = facts["sha256"] == hashlib.sha256(tensor_bytes(solution)).hexdigest()
    except Exception as error:
        raise ValueError(f"{path}: not a cached reference ({error}); delete it") from error
    if not intact:
        raise ValueError(f"{path}: the content does not match its checksum; delete it")
    return Teacher(solution, float(facts["error"]), int(facts["nfe"]))

"""A network's call in chunks of the batch: many particles in little memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from .branches import restore

UNBATCHED = ("img_ids", "txt_ids", "image_rotary_emb")  # one for the whole batch, whatever their first size


def install_chunks(module: torch.nn.Module, rows: int, stack: ExitStack) -> None:
    """Let ``module`` see at most ``rows`` rows at once; ``stack`` undoes it."""
    stack.callback(restore(module, "forward"))
    module.forward = chunked(module.forward, rows)


def chunked(forward: Callable[..., Any], rows: int) -> Callable[..., Any]:
    """``forward`` of a denoiser, called on slices of its first argument's batch and joined again."""

    def call(*args: Any, **kwargs: Any) -> Any:
        state = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        if not torch.is_tensor(state) or len(state) <= rows:
            return forward(*args, **kwargs)
        batch = len(state)
        parts = []
        for start in range(0, batch, rows):
            part = slice(start, start + rows)
            taken = {k: v if k in UNBATCHED else _take(v, batch, part) for k, v in kwargs.items()}
            parts.append(forward(*(_take(v, batch, part) for v in args), **taken))
        first = parts[0]
        if torch.is_tensor(first):
            return torch.cat(parts)
        if isinstance(first, tuple):
            return tuple(torch.cat([p[i] for p in parts]) if torch.is_tensor(first[i]) else first[i] for i in range(len(first)))
        joined = {k: torch.cat([p[k] for p in parts]) if torch.is_tensor(first[k]) else first[k] for k in first}
        return type(first)(**joined)

    return call


def _take(value: Any, batch: int, part: slice) -> Any:
    if torch.is_tensor(value):
        return value[part] if value.ndim > 0 and len(value) == batch else value
    if isinstance(value, dict):
        return {k: _take(v, batch, part) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_take(v, batch, part) for v in value)
    return value

"""Networks as models: logits of the clean tokens (MDLM, RADD, LLaDA, MaskGIT), or log scores (SEDD)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .processes import MaskedProcess, Process
from .run import Model
from .survival import as_float64

TIMES = ("none", "t", "alpha", "noise_ratio", "sigma")


def _argument(process: Process, time: str, x: Tensor, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """What the network is told about the time: nothing, or one number per row (B,)."""
    if time == "none":
        return ()
    alpha = process.alpha(t)
    value = {"t": as_float64(t), "alpha": alpha, "noise_ratio": 1.0 - alpha, "sigma": -alpha.log()}[time]
    return (value.expand(len(x)).to(device=x.device, dtype=dtype),)


def _check_time(time: str) -> None:
    if time not in TIMES:
        raise ValueError(f"unknown time input {time!r}; known: {', '.join(TIMES)}")


@dataclass(frozen=True)
class LogitsModel:
    """A network of x0-logits as a model; `from_logits` checks and builds it."""

    network: Callable[..., Tensor]
    process: Process
    time: str
    time_dtype: torch.dtype

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The posterior (B, L, V)."""
        return self.tempered(x, t, 1.0)

    def tempered(self, x: Tensor, t: Tensor, exponent: float | Tensor) -> Tensor:
        """The posterior to the power of ``exponent``, normalised: the exponent multiplies the logits."""
        logits = self.network(x, *_argument(self.process, self.time, x, t, self.time_dtype))
        _check_columns(logits, self.process.vocab)
        logits = logits[..., : self.process.vocab]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if torch.is_tensor(exponent) or exponent != 1.0:
            logits = exponent * logits
        return self.process.settle(logits.softmax(-1), x)


def from_logits(
    network: Callable[..., Tensor], process: Process, *, time: str = "none", time_dtype: torch.dtype = torch.float32
) -> LogitsModel:
    """A model from a network of x0-logits.

    Args:
        network: ``network(x)`` or ``network(x, time)`` -> logits (B, L, V or more); columns from V on (the mask, padding) are
            dropped. Probabilities are taken in at least float32.
        process: the noising process the network was trained for.
        time: what it takes as second argument, (B,): "none", "t", "alpha", "noise_ratio" = 1 - alpha (the mask ratio), or
            "sigma" = -log alpha.
        time_dtype: dtype of that argument.

    Raises:
        ValueError: unknown ``time``; when called, fewer than V logits per site.
    """
    _check_time(time)
    return LogitsModel(network, process, time, time_dtype)


def from_log_score(
    network: Callable[..., Tensor], process: Process, *, time: str = "sigma", time_dtype: torch.dtype = torch.float32
) -> Model:
    """A model from a network of log concrete scores (Lou et al. 2024, arXiv:2310.16834).

    Masked rows are normalised: an exact score sums to alpha / (1 - alpha) there, a learned one nearly does. The entry at x
    itself is taken as zero (a ratio of one), as SEDD does.

    Args:
        network: ``network(x, time)`` -> log scores (B, L, S), S = V + 1 for masked (the mask's column last) or V.
        process: the noising process.
        time: what the network takes, as in `from_logits`; SEDD takes "sigma" = -log alpha.
        time_dtype: dtype of that argument.
    """
    _check_time(time)

    def model(x: Tensor, t: Tensor) -> Tensor:
        log_score = network(x, *_argument(process, time, x, t, time_dtype))
        _check_columns(log_score, process.vocab)
        log_score = log_score.to(torch.promote_types(log_score.dtype, torch.float32))
        if isinstance(process, MaskedProcess):  # only ratios within a row matter: no overflow
            log_score = log_score[..., : process.vocab]
            log_score = log_score - log_score.amax(-1, keepdim=True)
        return process.posterior_of_score(log_score.exp(), x, t)

    return model


def to_log_score(model: Model, process: Process) -> Callable[[Tensor, Tensor], Tensor]:
    """The log concrete score (B, L, S) of a model: the inverse of `from_log_score`; -inf where a state cannot be reached."""

    def log_score(x: Tensor, t: Tensor) -> Tensor:
        return process.score(process.settle(model(x, t), x), x, t).log()

    return log_score


def _check_columns(output: Tensor, vocab: int) -> None:
    if output.shape[-1] < vocab:
        raise ValueError(f"the network returned {output.shape[-1]} columns per site, the vocabulary has {vocab}")

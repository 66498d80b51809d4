r"""Guidance as a shift of the x0-prediction: adding $w g$ to the score adds $(\sigma^2/\alpha)\,w\,g$ to $\hat x_0$.

That is Tweedie's formula, $\hat x_0 = (x_t + \sigma^2 s)/\alpha$, and what a network is shifted by follows from its
parametrization. With the exact $g = \nabla\log p(y|x_t)$ and w = 1 the shifted prediction is exactly $E[x_0|x_t, y]$.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..engine import Denoiser
from ..noise import NoiseSchedule
from .levels import alpha_bar

FORMS = ("eps", "mean")
SMALLEST_ALPHA_BAR = 1e-5  # below it the state holds no signal, and the shift's factor only multiplies the classifier's errors


class Classifier(Protocol):
    """What guidance needs of a classifier; `MinorityClassifier` is one."""

    bins: int
    parts: int
    classes: int | None

    def log_prob(self, x: Tensor, alpha: Tensor | float, sigma: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
        """(B, *E) states -> (B, bins - 1 + parts) log-probabilities, differentiable in x."""
        ...


Label = int | str | Sequence[int] | Tensor


def label_mask(classifier: Classifier, label: Label, batch: int) -> Tensor:
    """Which outputs of the classifier each sample is guided towards, (batch, labels) bool.

    Args:
        classifier: gives bins and parts.
        label: a bin in -L..L-1 (-1, the rarest, is the union of its parts); "each": sample i towards part i modulo the
            number of parts; "part:K" or "part:K,K,...": towards these parts in turn; or one bin per sample.
        batch: samples.

    Raises:
        ValueError: no such bin or part, parts where there is one, or a number of labels that does not divide ``batch``.
    """
    bins, parts = classifier.bins, classifier.parts
    outputs = torch.arange(bins - 1 + parts)
    if isinstance(label, str):
        kinds = torch.tensor(_parts(label, bins, parts))
        return outputs == (bins - 1 + kinds[torch.arange(batch) % len(kinds)])[:, None]
    chosen = torch.as_tensor(label, dtype=torch.int64).cpu().reshape(-1)
    wrong = chosen[(chosen < -bins) | (chosen >= bins)]
    if len(wrong):
        raise ValueError(f"label {wrong[0].item()} is outside {-bins}..{bins - 1}; bin {bins - 1} (or -1) is the rarest")
    if len(chosen) == 0 or batch % len(chosen):
        raise ValueError(f"{len(chosen)} labels do not fit a batch of {batch}")
    chosen = (chosen % bins).repeat(batch // len(chosen))[:, None]
    return (outputs == chosen) | ((chosen == bins - 1) & (outputs >= bins - 1))


def _parts(label: str, bins: int, parts: int) -> list[int]:
    """The parts that "each" or "part:K[,K...]" names."""
    listed = label.removeprefix("part:").split(",")
    if label != "each" and (not label.startswith("part:") or not all(k.isdecimal() for k in listed)):
        allowed = f"a bin in {-bins}..{bins - 1}, one bin per sample, 'each' or 'part:K[,K...]'"
        raise ValueError(f"label must be {allowed}, got {label!r}")
    if parts == 1:
        raise ValueError(f"label={label!r} needs a classifier with a split rarest bin; train it with several parts")
    chosen = list(range(parts)) if label == "each" else [int(k) for k in listed]
    if max(chosen) >= parts:
        raise ValueError(f"label={label!r}: this classifier has the parts 0..{parts - 1}")
    return chosen


def class_gradient(
    classifier: Classifier,
    x: Tensor,
    alpha: float,
    sigma: float,
    mask: Tensor,
    class_labels: Tensor | None = None,
) -> Tensor:
    r"""$\nabla_x \log \sum_{l \in \mathrm{mask}} p(l | x_t)$, (B, *E), at least float32; also under no_grad and inference_mode.

    Args:
        classifier: differentiable in x; its weights get no gradients.
        x: (B, *E) noisy states.
        alpha: signal level.
        sigma: noise level.
        mask: (B, labels) of `label_mask`.
        class_labels: (B,), for class-conditional classifiers.
    """
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone().to(torch.promote_types(x.dtype, torch.float32)).requires_grad_(True)
        class_labels = None if class_labels is None else class_labels.clone()
        log_prob = classifier.log_prob(x, alpha, sigma, class_labels)
        chosen = log_prob.masked_fill(~mask.to(log_prob.device), -math.inf).logsumexp(-1)
        return torch.autograd.grad(chosen.sum(), x)[0]


@dataclass(frozen=True)
class Window:
    """Where guidance acts, by share of signal: low <= alpha_bar <= high, at every ``every``-th evaluation.

    Raises:
        ValueError: bounds out of order or outside [0, 1], or ``every`` below 1.
    """

    low: float = 0.0
    high: float = 1.0
    every: int = 1

    def __post_init__(self) -> None:
        """Refuse an empty window."""
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"window must be (low, high) with 0 <= low < high <= 1 in alpha_bar, got {(self.low, self.high)}")
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"every must be a whole number of at least 1, got {self.every!r}")

    def __call__(self, alpha: float, sigma: float, index: int) -> bool:
        """Whether evaluation ``index`` at these levels is guided."""
        share = alpha_bar(alpha, sigma)
        inside = max(self.low, SMALLEST_ALPHA_BAR) <= share <= self.high and sigma > 0
        return inside and index % self.every == 0


def score_to_x0(alpha: float, sigma: float) -> float:
    r"""The x0-shift of a unit score shift: $\sigma^2/\alpha$."""
    return sigma**2 / alpha


def finite_rows(shift: Tensor) -> tuple[Tensor, Tensor]:
    """The shift with samples that are not finite set to zero, and how many those were (0-d)."""
    good = torch.isfinite(shift).flatten(1).all(1)
    return torch.where(good.reshape(-1, *[1] * (shift.ndim - 1)), shift, torch.zeros_like(shift)), (~good).sum()


def guided_denoiser(
    denoiser: Denoiser,
    noise_schedule: NoiseSchedule,
    classifier: Classifier,
    scale: float = 4.0,
    label: Label = -1,
    *,
    window: tuple[float, float] = (0.0, 1.0),
    form: str = "eps",
    times: Sequence[float] | None = None,
    class_labels: Tensor | None = None,
) -> Denoiser:
    r"""Classifier guidance towards a bin, for native sampling (`samplers.sample`).

    Args:
        denoiser: ``(x, t) -> x0``.
        noise_schedule: the denoiser's.
        classifier: any `Classifier`.
        scale: w >= 0; 1 is the posterior for an exact classifier.
        label: see `label_mask`.
        window: guided where low <= alpha_bar <= high.
        form: "eps" shifts the score by w g. "mean" shifts the mean of a first-order ancestral step by $w \Sigma g$ as Dhariwal
            & Nichol 2021 (arXiv:2105.05233, algorithm 1) do; its x0-shift has the levels of the step's end, so it needs
            ``times``.
        times: the solver schedule's times, for ``form="mean"``.
        class_labels: (B,), for class-conditional classifiers.

    Raises:
        ValueError: a value outside its range.
    """
    check_guidance(scale, form)
    label_mask(classifier, label, _multiple(label))
    inside = Window(*window)
    grid = None if times is None else torch.as_tensor(times, dtype=torch.float64)
    if form == "mean" and grid is None:
        raise ValueError("form='mean' needs times=, the solver schedule's times")

    def guided(x: Tensor, t: Tensor) -> Tensor:
        x0 = denoiser(x, t)
        alpha, sigma = (value.item() for value in noise_schedule.alpha_sigma(t))
        if scale == 0 or not inside(alpha, sigma, 0):
            return x0
        gradient = class_gradient(classifier, x, alpha, sigma, label_mask(classifier, label, len(x)), class_labels)
        factor = score_to_x0(alpha, sigma)
        if form == "mean":
            end = grid[(grid - float(t)).abs().argmin() + 1]
            factor = score_to_x0(*(value.item() for value in noise_schedule.alpha_sigma(end)))
        return x0 + finite_rows(gradient * (scale * factor))[0].to(x0.dtype)

    return guided


def check_guidance(scale: float, form: str = "eps") -> None:
    """Refuse a scale that is negative or not finite, and unknown forms.

    Raises:
        ValueError: naming the value.
    """
    if not (math.isfinite(scale) and scale >= 0):
        raise ValueError(f"scale must be a finite number >= 0, got {scale}; to go the other way choose label=0")
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}; known: {', '.join(FORMS)}")


def _multiple(label: Label) -> int:
    """A batch that fits the label, to check it before any compute."""
    return 1 if isinstance(label, int | str) else len(torch.as_tensor(label).reshape(-1))

"""Minority guidance as context managers around a pipeline: by a classifier, or by the model itself."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from .hooks import GuidanceRun, NetworkCall, guided_network
from .shifts import Classifier, Label, Window, check_guidance, class_gradient, label_mask, score_to_x0


@contextmanager
def minority_guidance(
    pipe: Any,
    classifier: Classifier,
    scale: float = 4.0,
    label: Label = -1,
    *,
    window: tuple[float, float] = (0.0, 1.0),
    every: int = 1,
    form: str = "eps",
    class_labels: Sequence[int] | Tensor | None = None,
) -> Iterator[GuidanceRun]:
    r"""Guide every call of ``pipe`` inside the block towards a bin of rarity (Um et al. 2024, arXiv:2301.12334, algorithm 1).

        with minority_guidance(pipe, MinorityClassifier.load("minority.safetensors"), scale=4.0):
            images = pipe(...).images

    Works in pixel and latent pipelines of every supported family, with any scheduler or solver schedule, with classifier-free
    guidance (both halves get the same shift, which therefore passes with weight one), learned variances, half precision, under
    ``no_grad`` and ``inference_mode``. With ``scale=0``, and after the block, results are bit-identical to the pipeline's own.
    Stochastic samplers (ddpm, euler_ancestral, sa_solver) tolerate larger scales than deterministic ones.

    Args:
        pipe: a diffusers pipeline.
        classifier: a `MinorityClassifier` for the pipeline's samples (pixels in [-1, 1], or scaled latents), or another object
            with the same ``log_prob``, ``bins``, ``parts`` and ``classes``.
        scale: w >= 0 of the score shift ``w grad log p``.
        label: -1, the rarest bin; any bin -L..L-1; one bin per image; or, where the rarest bin is split into parts, "each"
            (image i towards part i modulo their number) or "part:K[,K...]" (towards these parts in turn).
        window: guided where low <= alpha_bar <= high.
        every: guided at every n-th evaluation.
        form: "eps" shifts the prediction. "mean" shifts the mean of an ancestral step after sample clipping, by
            $w \Sigma g$ with the step's variance $\Sigma$ (Dhariwal & Nichol 2021, arXiv:2105.05233, algorithm 1); it needs a
            first-order ancestral scheduler.
        class_labels: one class per image, for a class-conditional classifier; None takes the pipeline's own.

    Yields:
        Counts of what was done.

    Raises:
        ValueError: a value outside its range, a classifier of another shape or without the classes it needs, or a pipeline or
            scheduler this cannot guide; all but the last before any network call.
    """
    check_guidance(scale, form)
    inside, run = Window(*window, every), GuidanceRun()
    label_mask(classifier, label, 1 if isinstance(label, int | str) else len(torch.as_tensor(label).reshape(-1)))
    if class_labels is not None and classifier.classes is None:
        raise ValueError("class_labels were given, but the classifier knows no classes")
    _place(classifier, pipe)
    pending: dict[str, Tensor] = {}
    masks: dict[tuple[int, int], Tensor] = {}
    scheduler = pipe.scheduler

    def shift(call: NetworkCall) -> Tensor | None:
        pending.clear()
        if form == "mean" and pipe.scheduler is not scheduler:
            raise ValueError("form='mean' works on the scheduler's step: change the scheduler outside the block, not inside")
        if scale == 0 or not inside(call.alpha, call.sigma, call.index):
            return None
        rows = len(call.state)
        images = rows // call.copies
        if (rows, call.copies) not in masks:
            masks[rows, call.copies] = label_mask(classifier, label, images).repeat(call.copies, 1).to(call.state.device)
        classes = _classes(classifier, call, class_labels)
        gradient = _gradient(classifier, call, masks[rows, call.copies], classes)
        if form == "mean":
            alpha_end, sigma_end = call.end
            log_ratio = -math.inf if sigma_end == 0 else math.log(call.alpha * sigma_end / (alpha_end * call.sigma))
            variance = sigma_end**2 * -math.expm1(2 * log_ratio)
            pending["mean"] = (scale * variance * gradient)[:images]
            run.guided += 1
            return None
        return gradient * (scale * score_to_x0(call.alpha, call.sigma))

    with guided_network(pipe, shift, run):
        if form == "eps":
            yield run
        else:
            with _shifted_steps(pipe.scheduler, pending):
                yield run


@contextmanager
def self_minority_guidance(
    pipe: Any,
    scale: float = 0.4,
    *,
    every: int = 5,
    level: float = 0.09,
    draws: int = 1,
    window: tuple[float, float] = (1e-3, 1.0),
    distance: str = "l2",
    conditional: str = "auto",
    generator: torch.Generator | None = None,
) -> Iterator[GuidanceRun]:
    r"""Guide ``pipe`` away from what its own one-step reconstruction keeps: no classifier and no data.

    At a guided evaluation the current $\hat x_0$ is noised again to ``level`` and denoised once more; the state moves up the
    gradient of the distance between the two (Um & Ye 2024, arXiv:2407.11555, equations 8-10), which flows through the first
    prediction only and is scaled to largest absolute value 1 per image. It costs one backward pass and ``draws`` further
    evaluations each time, and finds images the model is unsure of: rare ones if there are any in that direction, and spoiled
    ones if the scale is too large. Judge it together with how many images stay plausible.

    Args:
        pipe: a diffusers pipeline.
        scale: w >= 0 of the shift ``w g`` of the score.
        every: guided at every n-th evaluation.
        level: share of signal alpha_bar of the second noising; 0.09 is the published one.
        draws: noises per guided evaluation.
        window: guided where low <= alpha_bar <= high; below 1e-3 half precision spoils the prediction.
        distance: "l2" (Euclidean, not squared, as published) or "l1".
        conditional: with classifier-free guidance, the half of the batch whose prediction is measured: "first", "second", or
            "auto" (first in DiT pipelines, else second).
        generator: source of the second noise.

    Yields:
        Counts of what was done.

    Raises:
        ValueError: a value outside its range, or a pipeline this cannot guide.
    """
    from .reconstruction import reconstruction_gradient

    check_guidance(scale, "eps")
    if distance not in ("l2", "l1"):
        raise ValueError(f"unknown distance {distance!r}; known: l2, l1")
    if conditional not in ("auto", "first", "second"):
        raise ValueError(f"conditional must be auto, first or second, got {conditional!r}")
    if draws < 1 or not 0 < level < 1:
        raise ValueError(f"draws must be at least 1 and level in (0, 1), got {draws} and {level}")
    inside, run = Window(*window, every), GuidanceRun()
    first = conditional == "first" or (conditional == "auto" and type(pipe).__name__.startswith("DiT"))

    def shift(call: NetworkCall) -> Tensor | None:
        if scale == 0 or not inside(call.alpha, call.sigma, call.index):
            return None
        gradient = reconstruction_gradient(pipe, call, level, draws, distance, first, generator)
        return gradient * (scale * score_to_x0(call.alpha, call.sigma))

    with guided_network(pipe, shift, run):
        yield run


def _place(classifier: Classifier, pipe: Any) -> None:
    """Put a classifier that is a module where the pipeline runs, in float32."""
    if isinstance(classifier, torch.nn.Module):
        device = getattr(pipe, "_execution_device", None) or getattr(pipe, "device", "cpu")
        classifier.to(device=device, dtype=torch.float32).eval()


def _gradient(classifier: Classifier, call: NetworkCall, mask: Tensor, classes: Tensor | None) -> Tensor:
    """The classifier's gradient in the state's own layout; packed tokens (Flux) are unpacked for an image classifier."""
    shape, state = getattr(classifier, "shape", None), call.state
    if shape is not None and len(shape) == 3 and state.ndim == 3:
        channels, height, width = shape
        if (height * width // 4, channels * 4) == tuple(state.shape[1:]):
            sizes = {"h": height // 2, "w": width // 2, "p": 2, "q": 2}
            image = rearrange(state, "b (h w) (c p q) -> b c (h p) (w q)", **sizes)
            gradient = class_gradient(classifier, image, call.alpha, call.sigma, mask, classes)
            return rearrange(gradient, "b c (h p) (w q) -> b (h w) (c p q)", **{k: sizes[k] for k in "pq"})
    return class_gradient(classifier, state, call.alpha, call.sigma, mask, classes)


def _classes(classifier: Classifier, call: NetworkCall, given: Sequence[int] | Tensor | None) -> Tensor | None:
    """The class of every row; rows without one (classifier-free guidance) take that of the same image in the other half."""
    if classifier.classes is None:
        return None
    rows, device = len(call.state), call.state.device
    if given is not None:
        labels = torch.as_tensor(given, dtype=torch.int64, device=device).reshape(-1)
        if rows % len(labels):
            raise ValueError(f"{len(labels)} class_labels do not fit a batch of {rows // call.copies} images")
        return labels.repeat(rows // len(labels))
    labels = call.inputs.named.get("class_labels")
    if labels is None:
        raise ValueError("the classifier is class-conditional and the pipeline has no class labels: give class_labels=")
    labels = labels.to(torch.int64).expand(rows)
    if call.copies == 2:
        labels = torch.where(labels >= classifier.classes, labels.roll(rows // 2), labels)
    return labels.clamp(max=classifier.classes)


@contextmanager
def _shifted_steps(scheduler: Any, pending: dict[str, Tensor]) -> Iterator[None]:
    """Add the pending mean shift to what the scheduler's step returns."""
    _check_ancestral(scheduler)
    original: Callable[..., Any] = scheduler.step

    @functools.wraps(original)
    def step(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        shift = pending.pop("mean", None)
        if shift is None:
            return output
        before = output[0] if isinstance(output, tuple) else output.prev_sample
        after = (before.to(shift.dtype) + torch.nan_to_num(shift, 0.0, 0.0, 0.0)).to(before.dtype)
        if isinstance(output, tuple):
            return (after, *output[1:])
        output.prev_sample = after
        return output

    scheduler.step = step
    try:
        yield
    finally:
        del scheduler.step


def _check_ancestral(scheduler: Any) -> None:
    """Refuse schedulers whose step is not a first-order ancestral one in the state's own scaling."""
    name = type(scheduler).__name__
    if name == "DDPMScheduler":
        return
    source = getattr(scheduler, "source", None)
    recipe = getattr(getattr(source, "recipe", None), "name", None)
    options = getattr(source, "options", {})
    if name == "SolverScheduler" and (recipe == "ddpm" or (recipe in ("ddim", "euler_ancestral") and options["eta"] == 1.0)):
        return
    raise ValueError(
        f"form='mean' needs a first-order ancestral scheduler (DDPMScheduler, or a SolverScheduler with ddpm, ddim:eta=1 or "
        f"euler_ancestral) that stays in place inside the block; this is {name} {recipe or ''}; use form='eps'"
    )

"""Training the minority classifier: cross-entropy at random noise levels, early stop, resumable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ..noise import NoiseSchedule


class Trainable(Protocol):
    """What `fit` needs of a classifier; it is also a ``torch.nn.Module``. `MinorityClassifier` is one."""

    labels: int
    classes: int | None

    def __call__(self, x: Tensor, alpha: Tensor, sigma: Tensor, class_labels: Tensor | None, /) -> Tensor: ...  # noqa: D102


class Samples(Protocol):
    """Indexable data: ``data[indices]`` (a list or LongTensor) is a float batch (B, *E); tensors are."""

    def __len__(self) -> int: ...  # noqa: D105
    def __getitem__(self, indices: Any, /) -> Tensor: ...  # noqa: D105


@dataclass(frozen=True)
class FitSettings:
    """How `fit` trains; the defaults suit tens of thousands of small images.

    Attributes:
        steps: optimiser updates.
        batch_size: samples per update.
        lr: peak learning rate of AdamW, annealed linearly to 0.
        weight_decay: of AdamW.
        validation: share of the samples held out, stratified by label; 0 trains on all and does not stop early.
        check_every: updates between looks at the held-out loss.
        patience: looks without improvement before stopping; None never stops early.
        flip: mirror images at random.
        balanced: show every label equally often, however few samples have it. The loss is adjusted, so that the classifier's
            probabilities are still those of the data as it is.
        drop_class: how often a class-conditional classifier is shown "no class".
        seed: of everything random here.
    """

    steps: int = 3000
    batch_size: int = 256
    lr: float = 1e-3
    weight_decay: float = 0.05
    validation: float = 0.05
    check_every: int = 250
    patience: int | None = None
    flip: bool = False
    balanced: bool = False
    drop_class: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        for name in ("steps", "batch_size", "check_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("validation", "drop_class"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")


@dataclass(frozen=True)
class FitReport:
    """What came of a fit: updates done, where the kept weights were, held-out loss (nats) and accuracy there."""

    steps: int
    best_step: int
    validation_loss: float | None
    validation_accuracy: float | None


def fit(
    classifier: Any,
    data: Samples,
    labels: Tensor,
    noise_schedule: NoiseSchedule,
    settings: FitSettings | None = None,
    *,
    class_labels: Tensor | None = None,
    checkpoint: Path | None = None,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> FitReport:
    """Train ``classifier`` in place, leaving it with the weights of lowest held-out loss, in evaluation mode.

    Noise levels are drawn uniformly in the noise schedule's time. Accuracy is low at most levels and says little: judge by
    what guidance with the classifier makes.

    Args:
        classifier: a `Trainable` module, on the device to train on.
        data: (N, *E) clean samples in the model's units; a tensor, or anything indexable by a list of N indices.
        labels: (N,) int64 of `equal_count_bins`, `bins_within` or `split_rarest`.
        noise_schedule: whose levels the classifier will be used at.
        settings: see `FitSettings`.
        class_labels: (N,) int64, for a class-conditional classifier.
        checkpoint: written at every look and resumed from when it exists.
        progress: called with (step, training loss) after every look.

    Raises:
        ValueError: labels that do not fit, a checkpoint of another run, or a loss that is not finite.
    """
    settings = settings or FitSettings()
    _check(classifier, data, labels, class_labels)
    generator = torch.Generator().manual_seed(settings.seed)
    train, held_out = _split(labels, settings.validation, generator)
    rows_of = _sampler(labels, train, settings.balanced)
    run = _Run(
        classifier, data, labels, class_labels, noise_schedule, settings, generator, _log_shares(labels, classifier.labels)
    )
    optimiser = torch.optim.AdamW(classifier.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    state: dict[str, Any] = {"step": 0, "best_step": 0, "best_loss": None, "best_accuracy": None, "best": None, "stale": 0}
    if checkpoint is not None and checkpoint.is_file():
        state = _resume(checkpoint, classifier, optimiser, generator, settings)
    step = int(state["step"])
    while step < settings.steps:
        classifier.train()
        looks = min(settings.check_every - step % settings.check_every, settings.steps - step)
        running = torch.zeros((), device=next(classifier.parameters()).device)
        for _ in range(looks):
            rows = rows_of(settings.batch_size, generator)
            loss, _ = run.loss(rows)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
            for group in optimiser.param_groups:
                group["lr"] = settings.lr * (1 - step / settings.steps)
            optimiser.step()
            running += loss.detach()
            step += 1
        total = running.item() / looks
        if not total < float("inf"):
            raise ValueError(f"the training loss is {total} at step {step}: lower lr (now {settings.lr})")
        state["step"] = step
        _look(run, held_out, state)
        if checkpoint is not None:
            _save(checkpoint, classifier, optimiser, generator, settings, state)
        progress(step, total)
        if settings.patience is not None and state["stale"] >= settings.patience:
            break
    if state["best"] is not None:
        classifier.load_state_dict(state["best"])
    classifier.eval()
    return FitReport(step, int(state["best_step"]), state["best_loss"], state["best_accuracy"])


def _check(classifier: Any, data: Samples, labels: Tensor, class_labels: Tensor | None) -> None:
    if labels.shape != (len(data),):
        raise ValueError(f"{len(data)} samples need labels of shape ({len(data)},), got {tuple(labels.shape)}")
    if int(labels.min()) < 0 or int(labels.max()) >= classifier.labels:
        raise ValueError(f"labels must lie in 0..{classifier.labels - 1}, found {int(labels.min())}..{int(labels.max())}")
    if (class_labels is None) != (classifier.classes is None):
        raise ValueError("class_labels and a class-conditional classifier (classes=) go together")
    if class_labels is not None:
        low, high = int(class_labels.min()), int(class_labels.max())
        if class_labels.shape != labels.shape or low < 0 or high >= (classifier.classes or 0):
            raise ValueError(f"class_labels must be ({len(data)},) within 0..{(classifier.classes or 0) - 1}")


def _split(labels: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices to train on and to hold out, the same share of every label."""
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique() if share else ():
        rows = (labels == label).nonzero().flatten()
        held[rows[torch.randperm(len(rows), generator=generator)[: round(share * len(rows))]]] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()


def _sampler(labels: Tensor, train: Tensor, balanced: bool) -> Callable[[int, torch.Generator], Tensor]:
    """What draws the rows of a batch: all alike, or first a label and then one of its rows."""
    if not balanced:
        return lambda count, generator: train[torch.randint(len(train), (count,), generator=generator)]
    known, place, counts = labels[train].unique(return_inverse=True, return_counts=True)
    ordered, first = train[place.argsort(stable=True)], counts.cumsum(0) - counts

    def rows(count: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(known), (count,), generator=generator)
        within = torch.rand(count, generator=generator, dtype=torch.float64) * counts[chosen]
        return ordered[first[chosen] + within.long()]

    return rows


def _log_shares(labels: Tensor, outputs: int) -> Tensor:
    """Logarithm of every label's share of the samples, (outputs,); a label without samples counts as half of one."""
    counts = torch.bincount(labels.cpu(), minlength=outputs).double().clamp(min=0.5)
    return (counts / len(labels)).log().float()


@dataclass
class _Run:
    classifier: Any
    data: Samples
    labels: Tensor
    class_labels: Tensor | None
    noise_schedule: NoiseSchedule
    settings: FitSettings
    generator: torch.Generator
    log_shares: Tensor

    def loss(self, rows: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Cross-entropy of freshly noised samples, and how many were right.

        Balanced batches show a label p times too rarely or too often, p being its share; with log p taken from the logits in
        the loss, the logits themselves are those of the shares as they are (Menon et al. 2021, arXiv:2007.07314).
        """
        g = generator or self.generator
        device = next(self.classifier.parameters()).device
        x0 = self.data[rows].float()
        if self.settings.flip and generator is None:
            mirrored = torch.rand(len(x0), generator=g) < 0.5
            x0 = torch.where(mirrored.reshape(-1, *[1] * (x0.ndim - 1)).to(x0.device), x0.flip(-1), x0)
        t = torch.rand(len(x0), generator=g, dtype=torch.float64) * (1 - 1e-3) + 1e-3
        alpha, sigma = self.noise_schedule.alpha_sigma(self._time(t))
        noise = torch.randn(x0.shape, generator=g)
        column = (-1, *[1] * (x0.ndim - 1))
        alpha, sigma = alpha.float().to(device), sigma.float().to(device)
        x = alpha.reshape(column) * x0.to(device) + sigma.reshape(column) * noise.to(device)
        classes = None
        if self.class_labels is not None:
            dropped = torch.rand(len(rows), generator=g) < self.settings.drop_class
            classes = self.class_labels[rows].masked_fill(dropped, self.classifier.classes or 0).to(device)
        target = self.labels[rows].to(device)
        logits = self.classifier(x, alpha.clamp(min=1e-6), sigma, classes)
        if self.settings.balanced and generator is None:
            return F.cross_entropy(logits - self.log_shares.to(device), target), (logits.argmax(-1) == target).sum()
        return F.cross_entropy(logits, target), (logits.argmax(-1) == target).sum()

    def _time(self, u: Tensor) -> Tensor:
        """Uniform numbers in (0, 1) as times; EDM's are uniform in log sigma, since its time is sigma."""
        noise = self.noise_schedule
        if noise.family != "edm":
            return u * noise.t_max
        return (noise.t_min * (noise.t_max / noise.t_min) ** u).clamp(max=noise.t_max)


@torch.no_grad()
def _look(run: _Run, held_out: Tensor, state: dict[str, Any]) -> None:
    """Compare the held-out loss, always on the same noises, and keep the best weights."""
    if len(held_out) == 0:
        return
    run.classifier.eval()
    generator = torch.Generator().manual_seed(run.settings.seed + 1)
    repeats = max(1, 2000 // len(held_out))
    total, right, count = 0.0, 0, 0
    for rows in held_out.repeat(repeats).split(run.settings.batch_size):
        loss, correct = run.loss(rows, generator)
        total, right, count = total + loss.item() * len(rows), right + int(correct), count + len(rows)
    if state["best_loss"] is not None and total / count >= state["best_loss"]:
        state["stale"] += 1
        return
    weights = {name: value.detach().cpu().clone() for name, value in run.classifier.state_dict().items()}
    state.update(best_step=state["step"], best_loss=total / count, best_accuracy=right / count, best=weights, stale=0)


def _save(
    path: Path,
    classifier: Any,
    optimiser: torch.optim.Optimizer,
    generator: torch.Generator,
    settings: FitSettings,
    state: dict[str, Any],
) -> None:
    content = {
        "classifier": classifier.state_dict(), "optimiser": optimiser.state_dict(), "generator": generator.get_state(),
        "settings": asdict(settings), "state": state,
    }  # fmt: skip
    partial = path.with_name(path.name + ".part")
    torch.save(content, partial)
    partial.replace(path)


def _resume(
    path: Path,
    classifier: Any,
    optimiser: torch.optim.Optimizer,
    generator: torch.Generator,
    settings: FitSettings,
) -> dict[str, Any]:
    saved = torch.load(path, weights_only=True, map_location="cpu")
    if saved["settings"] != asdict(settings):
        changed = [key for key, value in asdict(settings).items() if saved["settings"].get(key) != value]
        raise ValueError(f"{path} is the checkpoint of another run ({', '.join(changed)} differ): remove it or use the same")
    classifier.load_state_dict(saved["classifier"])
    optimiser.load_state_dict(saved["optimiser"])
    generator.set_state(saved["generator"])
    return saved["state"]

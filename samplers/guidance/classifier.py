r"""The minority classifier $p_\psi(\tilde l | x_t)$: which bin of rarity a noisy sample comes from."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..noise import NoiseSchedule
from .fitting import FitReport, Samples, fit
from .networks import HalfUNet, ResidualMLP

FORMAT = "minority-classifier/1"
NETWORKS = ("mlp", "unet")
_OTHER = "tensors/"  # before the names of tensors that are no weights
_MLP_UP_TO = 256  # values per sample for which "auto" takes the MLP


class MinorityClassifier(nn.Module):
    r"""A noisy-sample classifier over bins of the minority score (Um et al. 2024, arXiv:2301.12334, section 3.2).

    It sees the state divided by $\sqrt{\alpha^2 + \sigma^2}$ and $\lambda = \log(\alpha/\sigma)$, so one classifier serves
    variance preserving, EDM and flow models of the same data. Train it with `fit`.

    Attributes:
        shape: of one sample, (*E).
        bins: L; bin L-1 is the rarest.
        parts: into how many kinds the rarest bin is split (`split_rarest`); 1 is the plain method.
        classes: number of conditional classes, or None.
        facts: JSON-native notes that travel with the file (scorer's settings, top variance of the data, ...).
        tensors: by name, that travel with the file too (a scorer's whitening).
    """

    def __init__(
        self,
        shape: Sequence[int],
        bins: int = 10,
        *,
        parts: int = 1,
        classes: int | None = None,
        network: str = "auto",
        width: int | None = None,
        depth: int | None = None,
        seed: int = 0,
    ) -> None:
        """Build an untrained classifier.

        Args:
            shape: of one sample: (D,), (C, H, W) or tokens (S, C).
            bins: L >= 2.
            parts: kinds of the rarest bin, >= 1.
            classes: conditional classes ("rare within a class"), or None.
            network: "mlp", "unet", or "auto": the MLP up to 256 values per sample and for shapes that are no images.
            width: of the network; 256 (mlp) or 64 (unet) when None.
            depth: residual blocks in all (mlp, 3) or per resolution (unet, 2).
            seed: of the initial weights.

        Raises:
            ValueError: a value outside its range, naming it.
        """
        super().__init__()
        self.shape = tuple(int(n) for n in shape)
        if not self.shape or min(self.shape) < 1:
            raise ValueError(f"shape must be the positive sizes of one sample, got {tuple(shape)}")
        for name, value, low in (("bins", bins, 2), ("parts", parts, 1), ("classes", 1 if classes is None else classes, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"{name} must be a whole number of at least {low}, got {value!r}")
        if network not in ("auto", *NETWORKS):
            raise ValueError(f"unknown network {network!r}; known: auto, {', '.join(NETWORKS)}")
        image = len(self.shape) == 3
        if network == "auto":
            network = "unet" if image and math.prod(self.shape) > _MLP_UP_TO else "mlp"
        if network == "unet" and not image:
            raise ValueError(f"network='unet' needs a shape (C, H, W), got {self.shape}; use 'mlp'")
        self.bins, self.parts, self.classes, self.kind = bins, parts, classes, network
        self.width = width or (256 if network == "mlp" else 64)
        self.depth = depth or (3 if network == "mlp" else 2)
        self.facts: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}
        outputs, sizes = bins - 1 + parts, {"width": self.width, "depth": self.depth}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if network == "mlp":
                self.network: nn.Module = ResidualMLP(math.prod(self.shape), outputs, classes, **sizes)
            else:
                self.network = HalfUNet(self.shape, outputs, classes, **sizes)

    @property
    def labels(self) -> int:
        """Number of outputs: the bins, with the rarest split into its parts."""
        return self.bins - 1 + self.parts

    def forward(self, x: Tensor, alpha: Tensor | float, sigma: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
        r"""Logits of the labels for noisy samples.

        Args:
            x: (B, *E) state $\alpha x_0 + \sigma\epsilon$.
            alpha: signal level, a number or (B,).
            sigma: noise level, a number or (B,).
            class_labels: (B,) int64 for a class-conditional classifier; ``classes`` means "no class".

        Returns:
            (B, labels) float32.

        Raises:
            ValueError: a state of another shape, or class labels where there should be none or none where there should be.
        """
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"the classifier was built for samples of shape {self.shape}, got {tuple(x.shape[1:])}")
        if (class_labels is None) != (self.classes is None):
            raise ValueError(
                "this classifier is class-conditional: give class_labels" if class_labels is None
                else "this classifier knows no classes: train it with class labels, or give none"
            )  # fmt: skip
        alpha, sigma = (torch.as_tensor(v, dtype=torch.float32, device=x.device).expand(len(x)) for v in (alpha, sigma))
        scale = torch.hypot(alpha, sigma).reshape(-1, *[1] * (x.ndim - 1))
        with torch.autocast(x.device.type, enabled=False):
            return self.network(x.float() / scale, alpha.log() - sigma.log(), class_labels)

    def log_prob(self, x: Tensor, alpha: Tensor | float, sigma: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
        """Log-probabilities (B, labels) float32; arguments as in `forward`."""
        return self(x, alpha, sigma, class_labels).log_softmax(-1)

    def fit(self, data: Samples, labels: Tensor, noise_schedule: NoiseSchedule, *args: Any, **options: Any) -> FitReport:
        """Train on binned samples; see `samplers.guidance.fit` for the arguments."""
        return fit(self, data, labels, noise_schedule, *args, **options)

    # ---- files -------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, weights and configuration, whole or not at all; returns its path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        config = {
            "format": FORMAT, "shape": list(self.shape), "bins": self.bins, "parts": self.parts, "classes": self.classes,
            "network": self.kind, "width": self.width, "depth": self.depth, "facts": self.facts,
        }  # fmt: skip
        partial = path.with_name(path.name + ".part")
        weights = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        weights |= {_OTHER + name: value.detach().cpu().contiguous() for name, value in self.tensors.items()}
        save_file(weights, partial, metadata={"config": json.dumps(config)})
        partial.replace(path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> MinorityClassifier:
        """Read a file that `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: another kind of file.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no minority classifier {path}; `fewstep minority train` writes one")
        with safe_open(path, framework="pt") as file:
            config = json.loads((file.metadata() or {}).get("config", "{}"))
            if config.get("format") != FORMAT:
                raise ValueError(f"{path} is not a minority classifier: its format is {config.get('format')!r}, not {FORMAT!r}")
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        config.pop("format")
        facts, shape = config.pop("facts"), config.pop("shape")
        classifier = cls(shape, config.pop("bins"), **config)
        others = {name for name in weights if name.startswith(_OTHER)}
        classifier.tensors = {name.removeprefix(_OTHER): weights.pop(name) for name in others}
        classifier.load_state_dict(weights)
        classifier.facts = facts
        return classifier.eval()

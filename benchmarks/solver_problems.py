"""The problems of the solver benchmark: a denoiser, noises with a converged solution, and what the samples should look like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from samplers import NoiseSchedule
from samplers.denoisers import EmpiricalDataset, GaussianMixture, from_network
from samplers.reference import digit_images, load, load_folder

CONFIG = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "clip_sample": False,
}
NOISE = NoiseSchedule.from_config(CONFIG)
Denoise = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """What is solved.

    Attributes:
        name: key in the ledger.
        title: heading in the report.
        about: a sentence for the report.
        denoiser: (x, t) -> x0, for any batch.
        shape: of one sample.
        real: (N, *shape) what samples are compared with.
        screen: noises on which every recipe is run with every grid.
        report: other noises, on which the choice is reported.
        converged: steps of the reference solution.
        dtype: of the arithmetic.
    """

    name: str
    title: str
    about: str
    denoiser: Denoise
    shape: tuple[int, ...]
    real: Tensor
    screen: int
    report: int
    converged: int
    dtype: torch.dtype = torch.float32


def mixture() -> Problem:
    """Twelve isotropic Gaussians in 64 dimensions; the denoiser is exact."""
    generator = torch.Generator().manual_seed(64)
    means = torch.randn(12, 64, generator=generator, dtype=torch.float64)
    stds = 0.1 + 0.4 * torch.rand(12, generator=generator, dtype=torch.float64)
    law = GaussianMixture(means, stds, 0.5 + torch.rand(12, generator=generator, dtype=torch.float64))
    real = law.sample(4096, torch.Generator().manual_seed(65))
    about = "Twelve isotropic Gaussians (standard deviations 0.1 to 0.5) in 64 dimensions, exact denoiser, float64."
    return Problem(
        "mixture-64d", "Exact mixture, 64 dimensions", about, law.denoiser(NOISE), (64,), real, 192, 1024, 400, torch.float64
    )


def empirical_digits() -> Problem:
    """The exact denoiser of scikit-learn's digits."""
    data = digit_images()[0]
    about = f"Exact denoiser of the {len(data)} handwritten digits of scikit-learn (8x8): the law that puts equal mass on each."
    denoiser = EmpiricalDataset(data).denoiser(NOISE)
    return Problem(
        "empirical-digits", "Empirical denoiser, digits", about, denoiser, tuple(data.shape[1:]), data, 192, 1024, 400
    )


def empirical_cifar(file: Path) -> Problem:
    """The exact denoiser of 2000 CIFAR-10 images at 16x16."""
    data = _images(file, "train")[:2000]
    about = "Exact denoiser of 2000 CIFAR-10 training images at 16x16."
    denoiser = EmpiricalDataset(data).denoiser(NOISE)
    return Problem(
        "empirical-cifar16",
        "Empirical denoiser, CIFAR-10 at 16x16",
        about,
        denoiser,
        (3, 16, 16),
        data,
        32,
        128,
        200,
    )


def reference_digits() -> Problem:
    """The unconditional reference pipeline."""
    pipe = load("digits")
    real = digit_images("test")[0]
    about = "The reference pipeline that ships, unconditional digits, compared with the held-out digits."
    return Problem(
        "reference-digits",
        "Reference pipeline",
        about,
        from_network(pipe.unet, NOISE),
        (1, 8, 8),
        real,
        16,
        32,
        80,
    )


def network_cifar(file: Path) -> Problem:
    """The class-conditional benchmark model; noise i has class i mod 10."""
    unet = load_folder(Path(__file__).parent / "models" / "cifar16").unet

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return from_network(unet, NOISE, class_labels=torch.arange(len(x)) % 10)(x, t)

    about = "The 16-pixel CIFAR-10 benchmark model, class-conditional without guidance, compared with the test images."
    real = _images(file, "test")[:4096]
    return Problem("network-cifar16", "CIFAR-10 model at 16x16", about, denoiser, (3, 16, 16), real, 4, 16, 40)


def _images(file: Path, split: str) -> Tensor:
    """(N, C, H, W) in [-1, 1]."""
    with np.load(file) as data:
        return torch.from_numpy(data[split]).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def problems(file: Path | None) -> dict[str, Callable[[], Problem]]:
    """Constructors by name; those of CIFAR-10 need its file."""
    found: dict[str, Callable[[], Problem]] = {
        "mixture-64d": mixture,
        "empirical-digits": empirical_digits,
        "reference-digits": reference_digits,
    }
    if file is not None:
        found["empirical-cifar16"] = lambda: empirical_cifar(file)
        found["network-cifar16"] = lambda: network_cifar(file)
    return found

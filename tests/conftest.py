"""Every test runs offline, on one thread and from the same seed."""

import os
from collections.abc import Callable

os.environ["HF_HUB_OFFLINE"] = "1"  # read when diffusers is imported

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Seed the global generator."""
    torch.manual_seed(0)


@pytest.fixture
def generator() -> Callable[..., torch.Generator]:
    """Make generators: ``generator(seed=0)``."""

    def make(seed: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    return make

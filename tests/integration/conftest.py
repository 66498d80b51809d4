"""Tiny pipelines with random weights, one of each kind that calls its scheduler differently. Nothing is downloaded."""

from collections.abc import Callable

import pytest
import torch
from diffusers.utils import logging
from tiny_pipelines.catalogue import MAKERS
from tiny_pipelines.harness import Tiny


@pytest.fixture
def build() -> Callable[..., Tiny]:
    """``build("sd")``: the same weights and inputs every time; options are those of the pipeline's maker."""

    def make(name: str, **options: object) -> Tiny:
        torch.manual_seed(0)
        return MAKERS[name](**options)

    return make


@pytest.fixture(autouse=True)
def quiet() -> None:
    """Pipelines log that absent text encoders are not saved."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()

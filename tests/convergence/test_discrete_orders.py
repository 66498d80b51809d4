"""Local order of every transition: its kernel against the exact reverse chain as the step shrinks."""

import math
from itertools import pairwise

import pytest
import torch

from samplers.discrete import CATALOGUE, MaskedProcess, ProductMixtureModel, TabularModel, UniformProcess, transition
from samplers.discrete.exact import _push_step
from samplers.discrete.transitions import Step

LENGTH, VOCAB = 3, 2


def weakly_coupled(process):
    """A mixture whose components are close: no rate falls below half of what it was, so nothing is clipped at zero."""
    generator = torch.Generator().manual_seed(0)
    sites = (0.35 * torch.randn(2, LENGTH, VOCAB, generator=generator, dtype=torch.float64)).softmax(-1)
    return ProductMixtureModel(torch.tensor([0.4, 0.6]), sites, process).law()


def local_errors(name, process, widths, t=0.6):
    law = weakly_coupled(process)
    model, base = TabularModel(law, process), transition(name)
    ids = torch.cartesian_prod(*[torch.arange(process.states)] * LENGTH)
    points = torch.cartesian_prod(*[torch.arange(VOCAB)] * LENGTH)

    def marginal(s):
        matrix = process.forward_matrix(0.0, s)
        return (law.flatten()[:, None] * matrix[points[:, None], ids[None]].prod(-1)).sum(0)

    found = []
    for width in widths:
        s = t - width
        forward = process.forward_matrix(s, t)[ids[:, None], ids[None]].prod(-1)
        joint = marginal(s)[:, None] * forward
        exact = (joint / joint.sum(0)).T  # row: law of x_s given x_t
        step = Step(index=0, steps=2, t=t, s=s)
        eye = torch.eye(len(ids), dtype=torch.float64)
        rows = torch.stack(
            [_push_step(model, process, base, step, ids, ids[i : i + 1], eye[i, i : i + 1]) for i in range(len(ids))]
        )
        found.append(float((rows - exact).abs().sum(-1).max()))
    return found


ORDERS = [
    # name, process, local order: global order plus one
    ("euler", MaskedProcess, 2),
    ("tau", MaskedProcess, 2),
    ("tweedie", MaskedProcess, 2),
    ("remdm:eta=0", MaskedProcess, 2),
    ("theta_trapezoidal", MaskedProcess, 3),
    ("theta_trapezoidal:theta=0.3", MaskedProcess, 3),
    ("theta_rk2", MaskedProcess, 2),
    ("euler", UniformProcess, 2),
    ("tau", UniformProcess, 2),
    ("tweedie", UniformProcess, 2),
    ("theta_trapezoidal", UniformProcess, 3),
    ("theta_rk2", UniformProcess, 2),
]


@pytest.mark.parametrize(
    ("name", "process", "local"), ORDERS, ids=lambda v: v if isinstance(v, str) else getattr(v, "__name__", v)
)
def test_local_order(name, process, local):
    process = process(VOCAB)
    widths = [0.04, 0.02, 0.01]
    errors = local_errors(name, process, widths)
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    assert slopes[-1] == pytest.approx(local, abs=0.15), (errors, slopes)
    assert transition(name).order == local - 1


def test_every_ordered_transition_is_measured():
    assert {name for name, entry in CATALOGUE.items() if entry.order} == {name.partition(":")[0] for name, *_ in ORDERS}

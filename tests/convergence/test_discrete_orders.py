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


def test_theta_rk2_is_of_first_order_because_its_leaps_are_drawn_apart():
    """Two coupled sites from all masks: the chance that both are revealed is the product of the rates at the start.

    The second evaluation corrects each site's chance, not that of both: the second leap starts over from the first state with
    its own draws. `theta_trapezoidal` leaps on from the trial state, and has the exact chance to leading order.
    """
    process = MaskedProcess(VOCAB)
    law = torch.tensor([[0.45, 0.05], [0.05, 0.45]], dtype=torch.float64)
    model, t, width = TabularModel(law, process), 0.6, 1e-3
    ids = torch.cartesian_prod(*[torch.arange(3)] * 2)
    hidden = ids[-1:]
    assert (hidden == process.mask_id).all()

    def both(name):
        found = _push_step(model, process, transition(name), Step(0, 2, t, t - width), ids, hidden, torch.ones(1).double())
        return found.view(3, 3)[0, 0] / width**2  # both sites show symbol 0

    rate = process.reverse_rates(model(hidden, torch.tensor(t)), hidden, t)[0, :, 0]
    after = process.reverse_rates(model(torch.tensor([[0, 2]]), torch.tensor(t)), torch.tensor([[0, 2]]), t)[0, 1, 0]
    exact = rate[0] * after  # half of two orders that are equally likely
    assert float(exact / (rate[0] * rate[1])) == pytest.approx(1.8, rel=1e-9)
    assert float(both("theta_rk2")) == pytest.approx(float(rate[0] * rate[1]), rel=0.01)
    assert float(both("tau")) == pytest.approx(float(rate[0] * rate[1]), rel=0.01)
    assert float(both("theta_trapezoidal")) == pytest.approx(float(exact), rel=0.01)

"""Variance preserving models: UniPC and DEIS against the in-tree classes, float32, in a pipeline's loop."""

from typing import Any

import pytest
from diffusers import DEISMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

STEPS = [4, 10, 20]
ORDERS = [1, 2, 3]
PREDICTIONS = ["epsilon", "sample", "v_prediction"]
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
AT_SIGMA_MIN = {"final_sigmas_type": "sigma_min"}


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("order", ORDERS)
def test_unipc(order: int, kind: str, steps: int, x: Tensor, tools: Any) -> None:
    options = {"solver_order": order, "prediction_type": kind}
    tools.agree(UniPCMultistepScheduler, f"unipc:order={order}", options, steps, x)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("pred", ["x0", "eps"])
@pytest.mark.parametrize("order", ORDERS)
def test_unipc_variants(order: int, pred: str, variant: str, steps: int, x: Tensor, tools: Any) -> None:
    """To sigma_min, since the in-tree results of bh1 and of noise prediction are not finite at sigma = 0."""
    options = {"solver_order": order, "solver_type": variant, "predict_x0": pred == "x0", **AT_SIGMA_MIN}
    tools.agree(UniPCMultistepScheduler, f"unipc:order={order},variant={variant},pred={pred}", options, steps, x)


@pytest.mark.parametrize("pred", ["x0", "eps"])
@pytest.mark.parametrize("order", ORDERS)
def test_unipc_variants_matter(order: int, pred: str, x: Tensor, tools: Any) -> None:
    """The comparison above can tell the variants apart, where they differ."""
    options = {"solver_order": order, "solver_type": "bh1", "predict_x0": pred == "x0", **AT_SIGMA_MIN}
    theirs, ours = tools.pair(UniPCMultistepScheduler, f"unipc:order={order},variant=bh2,pred={pred}", options, 10)
    assert tools.difference(theirs, ours, x) > 10 * tools.limit


OTHER = [
    ("unipc:order=3,lower_order_final=false", {"solver_order": 3, "lower_order_final": False, **AT_SIGMA_MIN}),
    ("unipc", {"thresholding": True, "sample_max_value": 1.3}),
    ("uni_pc_bh2", {"solver_order": 3, "timestep_spacing": "trailing", **SD}),
    ("uni_pc", {"solver_order": 3, "timestep_spacing": "leading", "solver_type": "bh1", **AT_SIGMA_MIN}),
]


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("recipe", "options"), OTHER)
def test_unipc_options(recipe: str, options: dict[str, Any], steps: int, x: Tensor, tools: Any) -> None:
    tools.agree(UniPCMultistepScheduler, recipe, options, steps, x)


def test_unipc_bh1_at_sigma_zero_is_finite(x: Tensor, tools: Any) -> None:
    """Where the in-tree class is not; the last step is then first order."""
    theirs, ours = tools.pair(UniPCMultistepScheduler, "uni_pc", {"solver_type": "bh1"}, 10)
    assert not tools.result(theirs, x).isfinite().all()
    assert tools.result(ours, x).isfinite().all()


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("order", ORDERS)
def test_deis(order: int, kind: str, steps: int, x: Tensor, tools: Any) -> None:
    """The in-tree class always ends at sigma_min."""
    options = {"solver_order": order, "prediction_type": kind}
    tools.agree(DEISMultistepScheduler, f"deis:order={order},final=sigma_min", options, steps, x)


DEIS_OPTIONS = [
    ("deis:order=3,final=sigma_min,lower_order_final=false", {"solver_order": 3, "lower_order_final": False}),
    ("deis:final=sigma_min", {"thresholding": True, "sample_max_value": 1.3}),
    ("deis:final=sigma_min", {"timestep_spacing": "trailing", **SD}),
]


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("recipe", "options"), DEIS_OPTIONS)
def test_deis_options(recipe: str, options: dict[str, Any], steps: int, x: Tensor, tools: Any) -> None:
    tools.agree(DEISMultistepScheduler, recipe, options, steps, x)

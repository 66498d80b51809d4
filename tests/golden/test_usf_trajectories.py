"""Published-format schedules against the trajectories of an independent implementation (float32, exact mixture model).

Files `usf/NOISE-STEPS-KIND.json` are random schedules in the published dict format, `usf/trajectories.safetensors`
what they produced. Kind "v3" also uses model statistics. A correct float64 implementation agrees to 8e-5 ("basic") and 9e-4
("v3"); the limits are their float32 rounding, which is larger in integrals of the statistics, with some room.
"""

import json
import warnings
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from samplers import NoiseSchedule, SolverSchedule, sample
from samplers.denoisers import GaussianMixture
from samplers.statistics import EmpiricalStatistics

FOLDER = Path(__file__).parent / "usf"
TENSORS = {name: value.double() for name, value in load_file(FOLDER / "trajectories.safetensors").items()}
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
LIMITS = {"basic": 2e-4, "v3": 2e-3}


def _alphas_cumprod(betas: Tensor) -> Tensor:
    return (1 - betas).cumprod(0)


NOISE = {
    "edm": NoiseSchedule.edm(),
    "linear": NoiseSchedule.vp_linear(),
    "sd": NoiseSchedule.vp_discrete(_alphas_cumprod(torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2)),
    "img": NoiseSchedule.vp_discrete(_alphas_cumprod(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))),
}
SPANS = {"edm": (80.0, 0.002), "linear": (1.0, 1e-4), "sd": (1.0, 1e-3), "img": (1.0, 1e-3)}  # of the statistics, in t
MODEL = GaussianMixture(TENSORS["model.means"], TENSORS["model.stds"], TENSORS["model.weights"])


def _statistics(kind: str) -> EmpiricalStatistics:
    """On 121 nodes even in lambda."""
    low, high = NOISE[kind].lam(torch.tensor(SPANS[kind], dtype=torch.float64)).tolist()
    lam = torch.linspace(low, high, 121, dtype=torch.float64)
    return EmpiricalStatistics(lam, TENSORS["v3.l"], TENSORS["v3.s"], TENSORS["v3.b"])


STATISTICS = {kind: _statistics(kind) for kind in SPANS}


def _read(name: str) -> tuple[dict, SolverSchedule]:
    mapping = json.loads((FOLDER / f"{name}.json").read_text())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "USF schedule: ignored keys nfe, noise_schedule", UserWarning)
        return mapping, SolverSchedule.from_usf(mapping)


def _run(name: str, schedule: SolverSchedule) -> tuple[Tensor, list[Tensor]]:
    kind, x = name.partition("-")[0], TENSORS[f"{name}.x_T"]
    tensors = {"first_x0": TENSORS["average_x0"], "statistics": STATISTICS[kind]}
    return sample(MODEL.denoiser(NOISE[kind]), x, schedule, NOISE[kind], trajectory=True, **tensors)


def _relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_all_of_them_are_here() -> None:
    assert len(NAMES) == 48
    assert sum("v3" in [step.pred[:2] for step in _read(name)[1].steps] for name in NAMES) == 21
    assert {name.partition("-")[0] for name in NAMES} == set(NOISE)


@pytest.mark.parametrize("name", NAMES)
def test_every_state_agrees(name: str) -> None:
    mapping, schedule = _read(name)
    assert schedule.nfe == mapping["nfe"]
    result, states = _run(name, schedule)
    limit = LIMITS[name.rpartition("-")[2]]
    expected = TENSORS[f"{name}.states"]
    assert len(states) == len(expected)
    errors = [_relative(state, wanted) for state, wanted in zip(states, expected, strict=True)]
    assert max(errors) < limit, errors
    assert _relative(result, TENSORS[f"{name}.x_0"]) < limit


@pytest.mark.parametrize("name", NAMES)
def test_the_json_form_gives_the_same_bits(name: str) -> None:
    _, schedule = _read(name)
    again = SolverSchedule.from_dict(json.loads(json.dumps(schedule.to_dict())))
    assert again == schedule
    assert torch.equal(_run(name, again)[0], _run(name, schedule)[0])


def test_a_wrong_schedule_is_noticed() -> None:
    """The limit separates: moving one inner time by 1% leaves it by far."""
    name = "linear-6step-basic"
    _, schedule = _read(name)
    times = list(schedule.times)
    times[3] *= 1.01
    moved = SolverSchedule(times=tuple(times), steps=schedule.steps)
    assert _relative(_run(name, moved)[0], TENSORS[f"{name}.x_0"]) > 2 * LIMITS["basic"]


@pytest.mark.parametrize("pred", ["x0", "eps", "v3"])
def test_a_wrong_reading_of_statistics_is_noticed(pred: str) -> None:
    """Neither another form nor statistics read at the exact times pass for the published reading."""
    name = "linear-8step-v3"
    _, schedule = _read(name)
    steps = [msgspec.structs.replace(step, pred=pred) if step.pred == "v3-nodes" else step for step in schedule.steps]
    other = msgspec.structs.replace(schedule, steps=tuple(steps))
    assert _relative(_run(name, other)[0], TENSORS[f"{name}.x_0"]) > 2 * LIMITS["v3"]

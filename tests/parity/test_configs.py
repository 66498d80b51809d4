"""Other schedulers' configs: every in-tree class ends up in the right family or is refused, and finds its way back."""

import importlib
import inspect
import json
import pkgutil
from pathlib import Path
from typing import Any

import diffusers.schedulers
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from samplers import NoiseSchedule
from samplers.schedulers import SolverScheduler

FAMILIES = {
    "vp": ("vp_discrete", "epsilon"),
    "flow": ("flow", "flow_prediction"),
    "trig": ("vp_trig", "v_prediction"),
    "edm": ("edm", "epsilon"),
}
# None: refused. Classes that cannot be built without arguments are not listed.
EXPECTED: dict[str, str | None] = {
    **dict.fromkeys(
        [
            *("CogVideoXDDIM", "CogVideoXDPM", "DDIM", "DDIMInverse", "DDIMParallel", "DDPM", "DDPMParallel"),
            *(
                "DEISMultistep",
                "DPMSolverMultistep",
                "DPMSolverMultistepInverse",
                "DPMSolverSinglestep",
                "DPMSolverSDE",
            ),
            *("EulerAncestralDiscrete", "EulerDiscrete", "HeunDiscrete", "KDPM2AncestralDiscrete", "KDPM2Discrete"),
            *("LCM", "LMSDiscrete", "PNDM", "SASolver", "TCD", "UnCLIP", "UniPCMultistep"),
        ],
        "vp",
    ),
    **dict.fromkeys(
        [
            *("FlowMapEulerDiscrete", "FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "FlowMatchLCM"),
            *("LTXEulerAncestralRF", "MiniMaxH3"),
        ],
        "flow",
    ),
    "IPNDM": "trig",
    **dict.fromkeys(["EDMEuler", "EDMDPMSolverMultistep", "CosineDPMSolverMultistep"], "edm"),
    **dict.fromkeys(
        [
            *("BlockRefinement", "DiscreteDDIM", "EntropyBound", "CMStochasticIterative", "ConsistencyDecoder", "SCM"),
            *("DDPMWuerstchen", "Helios", "HeliosDMD", "KarrasVe", "Piflow", "RePaint"),
            *("ScoreSdeVe", "ScoreSdeVp"),
        ]
    ),
}


def _in_tree() -> dict[str, type[SchedulerMixin]]:
    """Every scheduler class that can be imported and built without arguments."""
    found = {}
    for module in pkgutil.walk_packages(diffusers.schedulers.__path__, "diffusers.schedulers."):
        try:
            members = vars(importlib.import_module(module.name))
        except ImportError:  # an optional dependency
            continue
        for name, member in members.items():
            if not inspect.isclass(member) or not issubclass(member, SchedulerMixin) or member is SchedulerMixin:
                continue
            parameters = inspect.signature(member.__init__).parameters.values()
            required = [p for p in parameters if p.name != "self" and p.default is p.empty and p.kind <= p.KEYWORD_ONLY]
            if not [p for p in required if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]:
                found[name.removesuffix("Scheduler")] = member
    return found


IN_TREE = _in_tree()
SUPPORTED = [name for name in IN_TREE if EXPECTED.get(name)]


def _configs(scheduler: SchedulerMixin, folder: Path) -> dict[str, dict[str, Any]]:
    """The config as it is in memory (without a class name) and on disk."""
    memory = {key: value for key, value in scheduler.config.items() if key != "_class_name"}
    scheduler.save_pretrained(folder)
    return {"memory": memory, "disk": json.loads((folder / "scheduler_config.json").read_text())}


def test_every_class_is_known() -> None:
    assert {"DDIM", "FlowMatchEulerDiscrete", "EDMEuler"} <= set(IN_TREE)
    assert not set(IN_TREE) - set(EXPECTED), "new in-tree classes: say what becomes of them"


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")  # Helios, when it is built
@pytest.mark.parametrize("name", IN_TREE)
def test_default_built_classes(name: str, tmp_path: Path) -> None:
    family = EXPECTED.get(name)
    for config in _configs(IN_TREE[name](), tmp_path).values():
        if family is None:
            with pytest.raises(ValueError, match=r"is not supported|names no noise schedule"):
                SolverScheduler.from_config(config)
            continue
        ours = SolverScheduler.from_config(config)
        kind, prediction = FAMILIES[family]
        # The cosine class cannot be built without torchsde, and has another default.
        prediction = "v_prediction" if name.startswith("Cosine") else prediction
        assert (ours.noise_schedule.kind, ours.model_config.prediction_type) == (kind, prediction)
        assert NoiseSchedule.from_config(config).kind == FAMILIES[family][0]
        ours.set_timesteps(5, mu=1.0)
        assert len(ours.timesteps) == 5


@pytest.mark.parametrize("name", SUPPORTED)
def test_there_and_back_again(name: str, tmp_path: Path) -> None:
    """A -> ours -> A keeps A's config, in memory and through files."""
    cls = IN_TREE[name]
    before = cls()
    ours = SolverScheduler.from_config(before.config, schedule="unipc:order=3")
    after = cls.from_config(ours.config)
    ours.save_pretrained(tmp_path)
    from_file = cls.from_pretrained(tmp_path)
    for key, value in before.config.items():
        if not key.startswith("_"):
            assert after.config[key] == value, key
            assert from_file.config[key] == value, key


def test_values_that_are_no_defaults_come_back() -> None:
    options = {
        "solver_order": 3,
        "solver_type": "bh1",
        "flow_shift": 4.0,
        "use_flow_sigmas": True,
        "thresholding": True,
    }
    before = UniPCMultistepScheduler(**options, prediction_type="flow_prediction", timestep_spacing="trailing")
    after = UniPCMultistepScheduler.from_config(SolverScheduler.from_config(before.config).config)
    assert {key: value for key, value in after.config.items() if key in before.config and key[0] != "_"} == {
        key: value for key, value in before.config.items() if key[0] != "_"
    }


@pytest.mark.parametrize("name", [name for name in SUPPORTED if EXPECTED[name] == "vp"])
def test_alphas_cumprod(name: str) -> None:
    theirs = IN_TREE[name]()
    ours = SolverScheduler.from_config(theirs.config)
    if name.startswith("CogVideoX"):  # the only ones that compute them in float64
        torch.testing.assert_close(ours.alphas_cumprod.double(), theirs.alphas_cumprod, rtol=3e-6, atol=0)
    else:
        assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
        assert torch.equal(ours.betas, theirs.betas)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_alphas_cumprod_of_beta_schedules(schedule: str, zero_snr: bool) -> None:
    options = {"beta_schedule": schedule, "beta_end": 0.012, "num_train_timesteps": 500}
    theirs = DPMSolverMultistepScheduler(rescale_betas_zero_snr=zero_snr, **options)
    ours = SolverScheduler.from_config(theirs.config)
    torch.testing.assert_close(ours.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=2e-5, atol=1e-9)
    noise = NoiseSchedule.from_config(theirs.config)
    t = torch.arange(1, 501, dtype=torch.float64) / 500
    torch.testing.assert_close(noise.alpha(t) ** 2, ours.alphas_cumprod.double(), rtol=1e-12, atol=0)


def test_alphas_cumprod_of_cogvideox() -> None:
    theirs = CogVideoXDDIMScheduler(snr_shift_scale=1.0, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    ours = SolverScheduler.from_config(theirs.config)
    torch.testing.assert_close(ours.alphas_cumprod.double(), theirs.alphas_cumprod.double(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_prediction_types(kind: str) -> None:
    assert SolverScheduler.from_config(DDIMScheduler(prediction_type=kind).config).model_config.prediction_type == kind


def test_prediction_types_of_flow_models() -> None:
    """Classes of the DPM-Solver kind say what the network predicts; flow-match classes predict velocities, whatever it says."""
    theirs = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="epsilon")
    ours = SolverScheduler.from_config(theirs.config)
    assert (ours.model_config.family, ours.model_config.prediction_type) == ("flow", "epsilon")
    inherited = FlowMatchEulerDiscreteScheduler.from_config(DDIMScheduler(prediction_type="epsilon").config)
    ours = SolverScheduler.from_config({**inherited.config, "_class_name": "FlowMatchEulerDiscreteScheduler"})
    assert (ours.model_config.family, ours.model_config.prediction_type) == ("flow", "flow_prediction")


@pytest.mark.parametrize(
    ("theirs", "shift"),
    [
        (FlowMatchEulerDiscreteScheduler(shift=3.0), 3.0),
        (UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=5.0, prediction_type="flow_prediction"), 5.0),
        (DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=7.0, prediction_type="flow_prediction"), 7.0),
    ],
)
def test_static_shift(theirs: SchedulerMixin, shift: float) -> None:
    ours = SolverScheduler.from_config(theirs.config)
    assert ours.noise_schedule.kind == "flow"
    assert ours.config.shift == shift
    assert ours.noise_schedule.parameters["shift"] == shift


@pytest.mark.parametrize("cls", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
def test_edm_numbers(cls: type[SchedulerMixin]) -> None:
    ours = SolverScheduler.from_config(cls(sigma_min=0.01, sigma_max=40.0, sigma_data=0.7).config)
    assert (ours.noise_schedule.t_min, ours.noise_schedule.t_max) == (0.01, 40.0)
    assert ours.model_config.sigma_data == 0.7


def test_configs_that_are_refused() -> None:
    with pytest.raises(ValueError, match="names no noise schedule"):
        SolverScheduler.from_config({"num_train_timesteps": 1000})
    with pytest.raises(ValueError, match="unknown beta_schedule 'quadratic'"):
        SolverScheduler.from_config({"beta_start": 1e-4, "beta_schedule": "quadratic"})
    with pytest.raises(ValueError, match="unknown prediction type 'score'"):
        SolverScheduler.from_config({"beta_start": 1e-4, "prediction_type": "score"})
    with pytest.raises(ValueError, match="needs a scheduler config"):
        SolverScheduler.from_config()

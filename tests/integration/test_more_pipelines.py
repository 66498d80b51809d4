"""The swap in further pipelines: video with separate guidance calls or two experts, audio, images inside the state."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from diffusers.schedulers import scheduling_cosine_dpmsolver_multistep as cosine
from tiny_pipelines.audio import GeneratorNoise
from tiny_pipelines.catalogue import BASIC, MAKERS
from tiny_pipelines.harness import Tiny, relative

from samplers import NoiseSchedule, parse_recipe
from samplers.schedulers import swap

FURTHER = [name for name, maker in MAKERS.items() if maker not in BASIC]
RECIPES = ["unipc:order=2", "euler", "dpmpp:order=2,afs=zero_x0"]


@pytest.fixture(autouse=True)
def draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """In-tree stochastic classes draw as ours do; the law of their own draws is tested elsewhere."""
    monkeypatch.setattr(cosine, "BrownianTreeNoiseSampler", GeneratorNoise)


@pytest.mark.parametrize("name", FURTHER)
@pytest.mark.parametrize("text", RECIPES)
def test_swapped_runs_are_counted_and_repeat(name: str, text: str, build: Callable[..., Tiny]) -> None:
    """An analytic first step costs no evaluation, so every recipe makes the calls that were asked for."""
    tiny = build(name)
    old, before = tiny.pipe.scheduler, tiny(3)
    with swap(tiny.pipe, text):
        with tiny.counting() as batches:
            out = tiny(3)
        assert batches == [tiny.rows] * (3 * tiny.calls)
        assert out.isfinite().all()
        assert torch.equal(tiny(3), out)
        assert not torch.equal(tiny(3, seed=8), out)
    assert tiny.pipe.scheduler is old
    assert not any(denoiser._forward_pre_hooks for denoiser in tiny.denoisers)
    assert torch.equal(tiny(3), before)


@pytest.mark.parametrize("name", MAKERS)
def test_first_order_equals_in_tree(name: str, build: Callable[..., Tiny]) -> None:
    tiny = build(name)
    assert tiny.first_order
    own: dict[str, Any] = {} if tiny.sigmas is None else {"sigmas": tiny.sigmas}
    with tiny.cutting_timesteps() if tiny.whole_steps else nullcontext():
        for text, cls, options in tiny.first_order:
            tiny.pipe.scheduler = cls.from_config(tiny.pipe.scheduler.config, **options)
            expected = tiny(8)
            with swap(tiny.pipe, text):
                assert relative(tiny(8 - tiny.lost_answers, **own), expected) < 1e-4
            with swap(tiny.pipe, "dpmpp:order=2"):
                assert relative(tiny(8, **own), expected) > 1e-4  # the comparison can tell solvers apart


def test_second_order_of_a_stochastic_class(build: Callable[..., Tiny]) -> None:
    """Stable Audio's own solver, with the draws of one generator."""
    tiny = build("stable_audio_cosine")
    expected = tiny(8)
    with swap(tiny.pipe, "dpmpp:order=2,tau=1"):
        assert relative(tiny(8), expected) < 1e-4
    with swap(tiny.pipe, "dpmpp:order=1,tau=1"):
        assert relative(tiny(8), expected) > 1e-3


@pytest.mark.parametrize("options", [{"eta": 0.6}, {"eta": 1.0, "use_clipped_model_output": True}])
def test_arguments_of_ddim(options: dict[str, Any], build: Callable[..., Tiny]) -> None:
    tiny = build("ddim")
    expected = tiny(5, **options)
    with swap(tiny.pipe, "ddim"):
        assert relative(tiny(5, **options), expected) < 1e-4
        assert relative(tiny(5), expected) > 1e-3
    with swap(tiny.pipe, "unipc:order=2"), pytest.raises(ValueError, match="belong to DDIM"):
        tiny(5, **options)


# ---- late entry without a word ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.25, 0.5, 0.75])
def test_a_noisy_video_is_not_taken_for_noise(strength: float, build: Callable[..., Tiny]) -> None:
    """This pipeline never says where in the schedule it begins; the network's first input shows an analytic first step."""
    tiny = build("wan_v2v")
    tiny.inputs["strength"] = strength
    expected = tiny(8)
    with swap(tiny.pipe, "euler"):
        assert relative(tiny(8), expected) < 1e-4
    with swap(tiny.pipe, "euler:afs=zero_x0"), tiny.counting() as batches:
        out = tiny(8)
        times = tiny.pipe.scheduler.solver_schedule.times[1:]  # without the analytic step
    assert len(batches) == tiny.calls * int(8 * strength)
    plain = parse_recipe("euler").schedule(NoiseSchedule.flow(), 8, at=times)
    with swap(tiny.pipe, plain):
        assert relative(out, tiny(8)) < 1e-6


# ---- two experts -----------------------------------------------------------------------------------------------------


def test_a_schedule_runs_across_two_experts(build: Callable[..., Tiny]) -> None:
    """One history: the first step of the second expert still has the order of the recipe."""
    tiny = build("wan22")
    with swap(tiny.pipe, "dpmpp:order=2") as scheduler, tiny.seeing() as seen:
        out = tiny(6)
        times = scheduler.timesteps
    high = int((times >= 875).sum())
    assert 0 < high < 6
    assert [tiny.denoisers.index(module) for module, *_ in seen] == [0, 0] * high + [1, 1] * (6 - high)
    assert torch.equal(torch.stack([timestep[0] for *_, timestep in seen[::2]]), times)
    tiny.pipe.transformer_2.load_state_dict(tiny.pipe.transformer.state_dict())
    with swap(tiny.pipe, "dpmpp:order=2"):
        twins = tiny(6)
    assert not torch.equal(twins, out)
    tiny.pipe.register_to_config(boundary_ratio=None)
    with swap(tiny.pipe, "dpmpp:order=2"):
        assert torch.equal(tiny(6), twins)


@pytest.mark.parametrize("boundary", [0.5, 0.995])
def test_the_first_expert_that_is_called_gets_the_analytic_step(boundary: float, build: Callable[..., Tiny]) -> None:
    """Above the first evaluated time, the boundary leaves the whole run to the second expert."""
    tiny = build("wan22", boundary=boundary)
    with swap(tiny.pipe, "euler:grid=trailing"), tiny.first_answer_is_the_input():
        expected = tiny(5)
    with swap(tiny.pipe, "euler:grid=trailing,afs=zero_x0"), tiny.seeing() as seen:
        out = tiny(4)
    assert seen[0][0] is (tiny.pipe.transformer_2 if boundary > 0.99 else tiny.pipe.transformer)
    assert relative(out, expected) < 1e-5


# ---- conditions beside the state ---------------------------------------------------------------------------------------


# Not those whose answer to pure noise depends on its level (v-prediction).
SIMPLE_ANSWERS = [name for name in FURTHER if not name.startswith(("stable_audio", "dance", "wan_v2v", "wan_unipc"))]


@pytest.mark.parametrize("name", SIMPLE_ANSWERS)
def test_an_analytic_first_step_is_a_first_answer_of_pure_noise(name: str, build: Callable[..., Tiny]) -> None:
    """Also where the network's input holds an image: as further channels, or as a clean first frame."""
    tiny = build(name)
    with swap(tiny.pipe, "dpmpp:order=2,grid=trailing"), tiny.first_answer_is_the_input():
        expected = tiny(4)
    with swap(tiny.pipe, "dpmpp:order=2,grid=trailing,afs=zero_x0"):
        out = tiny(3)
    with swap(tiny.pipe, "dpmpp:order=2,grid=trailing"):
        assert relative(tiny(4), expected) > 1e-4  # the first answer matters
    assert relative(out, expected) < 1e-5


@pytest.mark.parametrize("name", ["ltx_i2v", "wan_ti2v", "wan_i2v"])
def test_an_analytic_first_step_leaves_the_image_alone(name: str, build: Callable[..., Tiny]) -> None:
    tiny = build(name)
    with swap(tiny.pipe, "euler:grid=trailing"), tiny.seeing() as plain:
        tiny(2)
    with swap(tiny.pipe, "euler:grid=trailing,afs=zero_x0"), tiny.seeing() as opened:
        tiny(2)
    first, other = plain[0][1], opened[0][1]
    image = {"ltx_i2v": (slice(None), slice(0, 1)), "wan_ti2v": (slice(None), slice(None), slice(0, 1))}
    place = image.get(name, (slice(None), slice(16, None)))
    assert torch.equal(first[place], other[place])
    assert (first != other).sum() == first.numel() - first[place].numel()


@pytest.mark.parametrize("outer", ["euler:afs=zero_x0", "euler"])
def test_a_swap_inside_a_swap(outer: str, build: Callable[..., Tiny]) -> None:
    tiny = build("wan")
    with swap(tiny.pipe, "dpmpp:order=2,afs=zero_x0"):
        expected = tiny(3)
    with swap(tiny.pipe, outer):
        around = tiny(3)
        with swap(tiny.pipe, "dpmpp:order=2,afs=zero_x0"):
            assert torch.equal(tiny(3), expected)
        assert torch.equal(tiny(3), around)
    assert not tiny.denoiser._forward_pre_hooks


def test_unknown_conditions_are_refused(build: Callable[..., Tiny]) -> None:
    """A pipeline that appends tokens to the state cannot be told from one that does not, until its first step."""
    tiny = build("ltx")
    with swap(tiny.pipe, "euler:afs=zero_x0") as scheduler, pytest.MonkeyPatch.context() as patch:
        whole = type(scheduler).step

        def head(self: Any, output: torch.Tensor, t: Any, sample: torch.Tensor, **options: Any) -> Any:
            return whole(self, output[:, :1], t, sample[:, :1], **options)

        patch.setattr(type(scheduler), "step", head)
        with pytest.raises(RuntimeError, match="shows the network more than the state"):
            tiny(2)

"""From data to noise and back; what other libraries call our recipes; where the named grids put their points."""

import itertools
from typing import Any

import diffusers
import pytest
import torch

from samplers import RECIPES, NoiseSchedule, parse_recipe, recipe, sample
from samplers.recipes import ALIASES, GRIDS, canonical
from samplers.recipes.grids import AYS_LEVELS, beta_quantiles
from samplers.testing import GaussianFlow

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()  # of Stable Diffusion
NOISES = {
    "vp": NoiseSchedule.vp_linear(),
    "cosine": NoiseSchedule.vp_cosine(),
    "discrete": NoiseSchedule.vp_discrete(torch.cumprod(1 - BETAS, 0)),
    "edm": NoiseSchedule.edm(),
    "flow": NoiseSchedule.flow(),
    "flow-3": NoiseSchedule.flow(3.0),
}
families = pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)

# ---- from data to noise ------------------------------------------------------------------------------------------------

DETERMINISTIC = [
    "ddim",
    "euler",
    "euler_ancestral:eta=0",
    "heun",
    "kdpm2",
    "pndm",
    "dpm",
    "dpm:order=3",
    "dpmpp",
    "dpmpp:order=3,taylor=true",
    "dpmpp_2s",
    "unipc",
    "unipc:order=3",
    "deis",
    "deis:axis=t",
    "ipndm",
    "lms",
    "sa_solver:tau=0",
]
STOCHASTIC = ["ddpm", "ddim:eta=0.5", "euler_ancestral", "dpmpp:tau=1", "dpm:method=multistep,tau=1", "sa_solver", "restart"]
STOCHASTIC += ["lcm", "tcd", "tcd:eta=0", "kdpm2:eta=1", "dpmpp_sde"]


def _also(text: str, option: str) -> str:
    return f"{text}{',' if ':' in text else ':'}{option}"


def test_every_recipe_is_in_one_of_the_lists() -> None:
    named = {parse_recipe(text).recipe.name for text in (*DETERMINISTIC, *STOCHASTIC)}
    assert named == {name for name, recipe in RECIPES.items() if not recipe.needs_statistics}


@pytest.mark.parametrize("kind", ["vp", "edm", "flow"])
@pytest.mark.parametrize("text", DETERMINISTIC)
def test_there_and_back(text: str, kind: str) -> None:
    """The noise is near the exact solution's, and the way back ends near the start, the nearer the more evaluations."""
    noise = NOISES[kind]
    flow, there, back = GaussianFlow(noise), [], []
    for nfe in (20, 160):
        inverse = recipe(_also(text, "inverse=true"), noise, nfe)
        forward = recipe(_also(text, "final=sigma_min"), noise, nfe)
        assert inverse.nfe == nfe
        assert (inverse.times[0], inverse.times[-1]) == pytest.approx((noise.t_min, noise.t_max))
        start, end = (torch.tensor(inverse.times[i], dtype=torch.float64) for i in (0, -1))
        x = flow.start(start)
        noisy, exact = sample(flow.denoise, x, inverse, noise), flow.solve(x, start, end)
        there.append(((noisy - exact).norm() / exact.norm()).item())
        back.append(((sample(flow.denoise, noisy, forward, noise) - x).norm() / x.norm()).item())
    assert there[1] < there[0] / 4
    assert back[1] < back[0] / 4
    assert max(there[1], back[1]) < 0.04


@pytest.mark.parametrize("text", STOCHASTIC)
def test_noise_has_no_inverse(text: str) -> None:
    with pytest.raises(ValueError, match=r"must not|no jumps"):
        recipe(_also(text, "inverse=true"), NOISES["vp"], 30)


# ---- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("DPM++ 2M", "dpmpp:order=2"),
        ("DPM++ 2M Karras", "dpmpp:order=2,grid=karras"),
        ("dpm++ 2m  karras", "dpmpp:order=2,grid=karras"),
        ("dpmpp_2m_karras", "dpmpp:order=2,grid=karras"),
        ("DPM++ 2M SDE", "dpmpp:order=2,tau=1"),
        ("DPM++ 2M SDE Karras", "dpmpp:order=2,tau=1,grid=karras"),
        ("DPM++ 3M SDE Exponential", "dpmpp:order=3,tau=1,grid=exponential"),
        ("sample_dpmpp_3m_sde", "dpmpp:order=3,tau=1"),
        ("Euler", "euler"),
        ("Euler a", "euler_ancestral"),
        ("euler_beta", "euler:grid=beta"),
        ("euler_sgm_uniform", "euler:grid=sgm_uniform"),
        ("Heun", "heun"),
        ("DPM2", "kdpm2"),
        ("DPM2 Karras", "kdpm2:grid=karras"),
        ("LMS Karras", "lms:grid=karras"),
        ("UniPC", "unipc"),
        ("uni_pc", "unipc:order=3,variant=bh1"),
        ("uni_pc_bh2", "unipc:order=3,variant=bh2"),
        ("uni_pc_karras", "unipc:order=3,variant=bh1,grid=karras"),
        ("res_multistep", "dpmpp:order=2,solver_type=heun"),
        ("ipndm_v", "lms:order=4"),
        ("DDIM", "ddim"),
        ("Restart", "restart"),
        ("LCM", "lcm"),
        ("DPMSolverMultistepScheduler", "dpmpp:order=2"),
        ("EulerAncestralDiscreteScheduler", "euler_ancestral"),
        ("UniPCMultistepScheduler", "unipc:order=2"),
        ("nobody", None),
        ("DPM++", "dpmpp"),
        ("karras", None),
        ("", None),
    ],
)
def test_canonical(theirs: str, ours: str | None) -> None:
    assert canonical(theirs) == ours


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_recipe_says_it_is_known_as_leads_back_to_it(name: str) -> None:
    for theirs in ", ".join(RECIPES[name].known_as.values()).split(", "):
        if theirs and "(" not in theirs:
            assert (canonical(theirs) or "").partition(":")[0] == name


@pytest.mark.parametrize("alias", ALIASES)
def test_aliases_are_recipes(alias: str) -> None:
    if alias.endswith("Scheduler"):
        assert hasattr(diffusers, alias)
    assert parse_recipe(alias) == parse_recipe(ALIASES[alias])
    assert recipe(alias, NOISES["vp"], 8).nfe == 8


def test_a_name_with_options_of_ours() -> None:
    assert parse_recipe("DPM++ 2M Karras:order=3") == parse_recipe("dpmpp:order=3,grid=karras")
    with pytest.raises(ValueError, match=r"unknown recipe 'DPM\+\+ 9X'; known: ddim"):
        parse_recipe("DPM++ 9X")


# ---- grids -------------------------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("name", GRIDS)
def test_grids_are_valid_for_every_number_of_points(name: str, noise: NoiseSchedule) -> None:
    if name.startswith("ays") and noise.family == "flow":
        with pytest.raises(ValueError, match=f"grid {name}"):
            recipe(f"ddim:grid={name},final=sigma_min", noise, 40)
        return
    for n in (1, 2, 3, 7, 20) if name == "dmn" else range(1, 41):  # an optimisation each
        points = GRIDS[name](noise, n).tolist()
        assert len(points) == n
        assert points[0] == noise.t_max or name == "leading"
        assert all(a > b > 0 for a, b in itertools.pairwise(points))
        below = name == "ays_svd" and noise.family == "vp"  # that table ends cleaner than these models do
        for final, end in (("zero", 0.0),) if below else (("zero", 0.0), ("sigma_min", noise.t_min)):
            times = recipe(f"ddim:grid={name},final={final}", noise, n).times
            assert len(times) == n + 1
            assert times[-1] == end


def _ratio(noise: NoiseSchedule, t: Any) -> list[float]:
    return noise.lam(torch.as_tensor(t, dtype=torch.float64)).neg().exp().tolist()


@pytest.mark.parametrize(
    ("table", "noise"),
    [
        ("ays_sd", NOISES["discrete"]),
        ("ays_sdxl", NOISES["discrete"]),
        ("ays_sd", NOISES["edm"]),
        ("ays_svd", NoiseSchedule.edm(0.002, 700.0)),
        ("ays_svd", NOISES["edm"]),
    ],
)
def test_align_your_steps_at_its_ten_levels(table: str, noise: NoiseSchedule) -> None:
    points = GRIDS[table](noise, 10)
    assert points[0] == noise.t_max
    assert _ratio(noise, points[1:]) == pytest.approx(AYS_LEVELS[table][1:10], rel=1e-9)
    double = GRIDS[table](noise, 20)
    assert _ratio(noise, double[2::2]) == pytest.approx(AYS_LEVELS[table][1:10], rel=1e-9)
    levels = [_ratio(noise, noise.t_max), *AYS_LEVELS[table][1:]]
    assert _ratio(noise, double[1::2]) == pytest.approx([(a * b) ** 0.5 for a, b in itertools.pairwise(levels)], rel=1e-9)


@pytest.mark.parametrize("n", [2, 5, 10, 33])
def test_beta_quantiles(n: int) -> None:
    q = beta_quantiles(n)
    assert (q[0], q[-1]) == (1, 0)
    torch.testing.assert_close(q + q.flip(0), torch.ones_like(q), rtol=0, atol=1e-12)
    assert n < 5 or q.diff().abs()[0] < q.diff().abs()[n // 2 - 1]  # denser at both ends


def test_grids_of_a_very_noisy_edm_model_begin_at_its_own_level() -> None:
    """The floor for grids in lambda is meant for models whose alpha vanishes."""
    noise = NoiseSchedule.edm(0.002, 700.0)
    assert GRIDS["exponential"](noise, 3).tolist() == pytest.approx([700.0, (700 * 0.002) ** 0.5, 0.002])
    assert GRIDS["lambda"](noise, 2).tolist() == pytest.approx([700.0, (700 * 0.002) ** 0.5])
    assert GRIDS["karras"](noise, 3)[1].item() == pytest.approx(((700 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7)


@families
def test_quadratic(noise: NoiseSchedule) -> None:
    high, low, shift = noise.t_max**0.5, noise.t_min**0.5, noise.parameters.get("shift", 1.0)
    wanted = [(high + (low - high) * i / 8) ** 2 for i in range(8)]
    wanted = [shift * t / (1 + (shift - 1) * t) for t in wanted]
    assert GRIDS["quadratic"](noise, 8).tolist() == pytest.approx(wanted, rel=1e-13)

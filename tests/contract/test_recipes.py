"""Recipes: every one makes valid schedules of exactly the NFE asked for; bad text is refused with what is known."""

import pytest
import torch
from torch import Tensor

from samplers import RECIPES, NoiseSchedule, SolverSchedule, parse_recipe, recipe, sample
from samplers.denoisers import GaussianMixture
from samplers.recipes import ALIASES, GRIDS
from samplers.testing.orders import STATISTICS

NOISE = {
    "vp_linear": NoiseSchedule.vp_linear(),
    "vp_cosine": NoiseSchedule.vp_cosine(),
    "vp_discrete": NoiseSchedule.vp_discrete((1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)),
    "edm": NoiseSchedule.edm(),
    "flow": NoiseSchedule.flow(),
}
ALL = pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)
LAW = GaussianMixture(torch.tensor([[1.0, -0.5]]), torch.tensor([0.3]))
TEXTS = [
    *RECIPES,
    *ALIASES,
    "dpmpp:order=3,taylor=true",
    "dpmpp:order=1",
    "unipc:order=4,pred=eps",
    "deis:order=4,axis=sigma",
    "ddim:afs=zero_x0",
    "dpmpp_2s:afs=average_x0",
    "ipndm:afs=average_x0,final=sigma_min",
    "dpm_v3:pseudo=true,half=true,final=zero",
    "dpm_v3:order=2,corrector=taylor,lower_order_final=false",
]


@ALL
@pytest.mark.parametrize("text", TEXTS)
def test_the_network_is_called_exactly_nfe_times(text: str, noise: NoiseSchedule) -> None:
    for nfe in range(1, 13):
        schedule, calls = recipe(text, noise, nfe), []

        def counting(x: Tensor, t: Tensor) -> Tensor:
            calls.append(t.item())  # noqa: B023
            return LAW.denoiser(noise)(x, t)

        sample(counting, torch.ones(1, 2, dtype=torch.float64), schedule, noise, first_x0=LAW.mean, statistics=STATISTICS)
        assert len(calls) == nfe == schedule.nfe
        jumps = any(step.eval.source == "none" for step in schedule.steps)
        assert jumps or calls == sorted(calls, reverse=True)


@pytest.mark.parametrize(
    ("grid", "family"),
    [(grid, family) for grid in GRIDS for family in NOISE if not grid.startswith("ays") or "vp" in family],
)
def test_grids_fall_from_the_start_to_the_end(grid: str, family: str) -> None:
    noise = NOISE[family]
    for nfe in (1, 2, 3, 7, 12):
        zero, low = (recipe(f"ddim:grid={grid},final={final}", noise, nfe).times for final in ("zero", "sigma_min"))
        assert zero[-1] == 0.0
        assert low[-1] == noise.t_min
        for times in (zero, low):
            assert len(times) == nfe + 1
            assert list(times) == sorted(times, reverse=True)
            assert times[0] == noise.t_max or grid == "leading"


@ALL
def test_named_grids_are_even_in_what_they_say(noise: NoiseSchedule) -> None:
    def levels(grid: str) -> Tensor:
        t = torch.tensor(recipe(f"ddim:grid={grid}", noise, 9).times[:-1], dtype=torch.float64)[1:]
        return t

    def even(values: Tensor) -> bool:
        gaps = values.diff()
        return bool((gaps / gaps[0] - 1).abs().max() < 1e-6)

    flow = noise.family == "flow"
    assert even(levels("linspace"))
    assert even(levels("trailing"))
    assert even(noise.lam(levels("lambda")))
    ratio = (lambda t: noise.sigma(t)) if flow else (lambda t: torch.exp(-noise.lam(t)))
    assert even(ratio(levels("karras")) ** (1 / 7))
    assert even(ratio(levels("exponential")).log())


def test_flow_shift_moves_the_grid_but_not_the_path() -> None:
    plain, shifted = recipe("ddim", NOISE["flow"], 4), recipe("ddim:shift=3", NOISE["flow"], 4)
    assert recipe("ddim", NoiseSchedule.flow(3.0), 4).times == shifted.times
    assert shifted.times == pytest.approx([3 * t / (1 + 2 * t) for t in plain.times])


def test_karras_rho_and_an_explicit_grid() -> None:
    noise = NOISE["edm"]
    times = recipe("ddim:grid=karras,rho=5", noise, 4).times
    root = [t ** (1 / 5) for t in times[:-1]]
    assert root[0] - root[1] == pytest.approx(root[2] - root[3])
    assert parse_recipe("ddim:grid=karras").names_grid
    assert not parse_recipe("ddim:rho=5").names_grid
    given = parse_recipe("dpmpp").schedule(NOISE["flow"], 2, at=(0.9, 0.5, 0.1))
    assert given.times == (0.9, 0.5, 0.1)
    with pytest.raises(ValueError, match="dpmpp with 2 evaluations has 3 grid times, got 2"):
        parse_recipe("dpmpp").schedule(NOISE["flow"], 2, at=(0.9, 0.5))


@pytest.mark.parametrize(("alias", "text"), ALIASES.items())
def test_aliases_are_their_text(alias: str, text: str) -> None:
    noise = NOISE["vp_linear"]
    assert recipe(alias, noise, 6) == recipe(text, noise, 6)
    more = f"{text}{',' if ':' in text else ':'}grid=karras"
    assert recipe(f"{alias}:grid=karras", noise, 6) == recipe(more, noise, 6)


@pytest.mark.parametrize("text", TEXTS)
def test_recipes_survive_their_json(text: str) -> None:
    for noise in NOISE.values():
        schedule = recipe(text, noise, 5)
        assert SolverSchedule.from_dict(schedule.to_dict()) == schedule


def test_every_recipe_describes_itself() -> None:
    for name, found in RECIPES.items():
        assert found.name == name
        assert found.summary.endswith((".", ":"))
        assert found.order({**found.defaults}) in (None, 1, 2, 3, 4)
        assert found.order_grid in ("any", "even-sigma")
        needs = any(step.pred == "v3" for step in recipe(name, NOISE["vp_linear"], 4).steps)
        assert needs == found.needs_statistics


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("unipcc", "unknown recipe 'unipcc'; known: ddim, euler, .*dpmpp, dpm_v3, unipc, deis, ipndm"),
        ("", "unknown recipe ''; known: ddim"),
        ("schedule.json", "unknown recipe 'schedule.json'; known"),
        ("unipc:oder=3", "recipe 'unipc' has no option 'oder'; known: order, variant, pred, .*grid, rho"),
        ("ddim:order=2", "recipe 'ddim' has no option 'order'; known: .*grid, rho"),
        ("ddim:order", "'order' is not of the form key=value"),
        ("ddim:grid=", "'grid=' is not of the form key=value"),
        ("unipc:order=five", "order='five' should be a whole number"),
        ("unipc:order=2.5", "order='2.5' should be a whole number"),
        ("unipc:order=5", "unipc: order must be 1..4, got 5"),
        ("unipc:variant=bh3", "unipc: unknown variant 'bh3'; known: bh1, bh2"),
        ("unipc:pred=v", "unipc: unknown pred 'v'; known: x0, eps"),
        ("dpmpp:method=both", "dpmpp: unknown method 'both'; known: multistep, singlestep"),
        ("dpmpp:order=4", "dpmpp: order must be 1..3, got 4"),
        ("dpmpp:method=singlestep,tau=1", "dpmpp: tau = 1.0 needs method multistep"),
        ("ddim:eta=2", "eta must be in .0, 1., got 2"),
        ("heun:order=3", "recipe 'heun' has no option 'order'; known: grid, rho"),
        ("restart:low=0.5", "restart needs .* 0 < low < high"),
        ("dpmpp:solver_type=rk", "unknown solver_type 'rk'; known: midpoint, heun"),
        ("dpmpp:taylor=maybe", "taylor='maybe' should be true or false"),
        ("deis:axis=rho", "deis: unknown axis 'rho'; known: lambda, t, sigma"),
        ("deis:order=0", "deis: order must be 1..4, got 0"),
        ("ipndm:order=5", "ipndm: order must be 1..4, got 5"),
        ("ddim:grid=even", "unknown grid 'even'; known: linspace, inclusive, trailing"),
        ("ddim:afs=yes", "unknown afs 'yes'; known: none, zero_x0, average_x0"),
        ("ddim:final=small", "unknown final 'small'; known: zero, sigma_min"),
        ("ddim:grid=karras,rho=0", "rho must be positive"),
        ("ddim:rho=x", "rho='x' should be a number"),
        ("ddim:clip=x", "clip='x' should be a number"),
        ("ddim:clip=-1", "clip must be positive"),
        ("ddim:shift=2", "shift belongs to flow models; this noise schedule is vp_linear"),
    ],
)
def test_bad_text_is_refused_with_what_is_known(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        recipe(text, NOISE["vp_linear"], 4)


def test_a_grid_that_goes_below_the_asked_end_is_refused() -> None:
    with pytest.raises(ValueError, match=r"with 40 steps .* not above the end t_min = 0.001 .*use final=zero"):
        recipe("ddim:grid=ays_svd,final=sigma_min", NOISE["vp_linear"], 40)


@pytest.mark.parametrize("nfe", [0, -3, True, 2.5, 4.0, "4", None])
def test_nfe_is_a_positive_whole_number(nfe) -> None:
    with pytest.raises(ValueError, match=f"nfe must be a whole number of at least 1, got {nfe!r}"):
        recipe("ddim", NOISE["vp_linear"], nfe)

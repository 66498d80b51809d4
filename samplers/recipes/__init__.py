"""Recipes: a name and an NFE make a solver schedule. A new solver is a function here, not a class anywhere."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from ..noise import NoiseSchedule
from ..strategy import Evaluation, SolverSchedule, StepStrategy
from .adams import deis, ipndm
from .dpmpp import dpmpp
from .first_order import ddim, euler
from .grids import DEFAULT_GRIDS, GRIDS, RHO, grid_named, karras, round_to_training_steps, times
from .unipc import unipc

__all__ = ["ALIASES", "GRIDS", "RECIPES", "Recipe", "RecipeText", "parse_recipe", "recipe", "round_to_training_steps"]

Steps = Callable[..., tuple[StepStrategy, ...]]


# Named functions here, not lambdas: schedulers hold a recipe and are pickled.
def _order_option(options: Mapping[str, Any]) -> int:
    return int(options["order"])


def _order_one(options: Mapping[str, Any]) -> int:
    return 1


@dataclass(frozen=True)
class Recipe:
    """A named solver and the facts other parts ask for.

    Attributes:
        name: canonical name.
        steps: ``steps(n, to_zero, **options)`` gives the strategies.
        spacing: how in-tree schedulers of this kind read ``timestep_spacing``: "inclusive" (DDIM, Euler) or "exclusive" (DPM).
        honours: config keys for processing x0 that the in-tree class obeys.
        order: declared local order given the options, on the grid named by ``order_grid``.
        order_grid: "any", or the only axis on which the order holds ("even-sigma").
    """

    name: str
    steps: Steps
    spacing: str = "exclusive"
    honours: tuple[str, ...] = ()
    order: Callable[[Mapping[str, Any]], int] = _order_option
    order_grid: str = "any"

    @property
    def defaults(self) -> dict[str, Any]:
        """The options that recipe text may set, with their defaults."""
        parameters = inspect.signature(self.steps).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}

    @property
    def summary(self) -> str:
        """First line of the recipe's documentation."""
        return (inspect.getdoc(self.steps) or "").splitlines()[0]


def _dpmpp_order(options: Mapping[str, Any]) -> int:
    return min(int(options["order"]), 3 if options["taylor"] else 2)


RECIPES = {
    r.name: r
    for r in (
        Recipe("ddim", ddim, "inclusive", ("clip_sample", "thresholding"), order=_order_one),
        Recipe("euler", euler, "inclusive", order=_order_one),
        Recipe("dpmpp", dpmpp, honours=("thresholding",), order=_dpmpp_order),
        Recipe("unipc", unipc, honours=("thresholding",)),
        Recipe("deis", deis, honours=("thresholding",)),
        Recipe("ipndm", ipndm, "inclusive", order_grid="even-sigma"),
    )
}
ALIASES: dict[str, str] = {
    "dpmpp_2m": "dpmpp:order=2",
    "dpmpp_3m": "dpmpp:order=3",
    "dpmpp_2s": "dpmpp:order=2,method=singlestep",
    "uni_pc": "unipc:order=3,variant=bh1",
    "uni_pc_bh2": "unipc:order=3,variant=bh2",
}
_COMMON: dict[str, Any] = {"grid": None, "rho": RHO, "shift": None, "final": "zero", "afs": "none", "clip": "config"}
_SOURCES = ("none", "zero_x0", "average_x0")


@dataclass(frozen=True)
class RecipeText:
    """Parsed recipe text: a recipe with its options, ready for any noise schedule and NFE.

    Attributes:
        recipe: the solver.
        options: its own options, all of them.
        common: grid, rho, shift, final, afs, clip.
    """

    recipe: Recipe
    options: Mapping[str, Any]
    common: Mapping[str, Any]
    given: frozenset[str]

    @property
    def names_grid(self) -> bool:
        """Whether the text asks for a grid, so that a caller's own times do not replace it."""
        return "grid" in self.given

    @property
    def analytic_first_step(self) -> bool:
        """Whether the first step needs no evaluation."""
        return bool(self.common["afs"] != "none")

    def schedule(self, noise_schedule: NoiseSchedule, nfe: int, *, at: tuple[float, ...] | None = None) -> SolverSchedule:
        """The solver schedule with ``nfe`` network evaluations.

        Args:
            noise_schedule: where the times lie.
            nfe: network evaluations, >= 1.
            at: the schedule's times (one more than steps) instead of the grid's.

        Raises:
            ValueError: an NFE below 1, or times that do not fit.
        """
        if isinstance(nfe, bool) or not isinstance(nfe, int) or nfe < 1:
            raise ValueError(f"nfe must be a whole number of at least 1, got {nfe!r}")
        common, analytic = self.common, self.analytic_first_step
        n = nfe + analytic
        if at is None:
            at = self._grid_times(noise_schedule, n)
        elif len(at) != n + 1:
            raise ValueError(f"{self.recipe.name} with {nfe} evaluations has {n} steps and {n + 1} times, got {len(at)} times")
        to_zero = bool(noise_schedule.sigma(at[-1]) == 0)
        steps = self.recipe.steps(n, to_zero, **self.options)
        if analytic:
            first = msgspec.structs.replace(steps[0], eval=Evaluation(source=common["afs"]))
            steps = (first, *steps[1:])
        return SolverSchedule(
            times=at,
            steps=steps,
            name=f"{self.recipe.name}-nfe{nfe}",
            path={"type": noise_schedule.kind, **noise_schedule.parameters},
            clip=common["clip"],
        )

    def _grid_times(self, noise: NoiseSchedule, n: int) -> tuple[float, ...]:
        common = self.common
        name = common["grid"] or DEFAULT_GRIDS[noise.family]
        if common["shift"] is not None:
            if noise.kind != "flow":
                raise ValueError(f"shift belongs to flow models; this noise schedule is {noise.kind}")
            noise = NoiseSchedule.flow(common["shift"])
        grid = grid_named(name)
        if grid is karras:
            points = times(noise, _with_rho(common["rho"]) if common["rho"] != RHO else karras, n, common["final"])
        else:
            points = times(noise, grid, n, common["final"])
        return points


def _with_rho(rho: float) -> Callable[..., Any]:
    if not rho > 0:
        raise ValueError(f"rho must be positive, got {rho}")
    return lambda noise, n: karras(noise, n, rho)


def _convert(key: str, text: str, default: Any) -> Any:
    """An option's text as the type of its default."""
    try:
        if key == "clip":
            return None if text == "none" else "config" if text == "config" else float(text)
        if isinstance(default, bool):
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        if isinstance(default, int):
            return int(text)
        if isinstance(default, float) or key == "shift":
            return float(text)
    except (ValueError, KeyError):
        kind = "true or false" if isinstance(default, bool) else "a whole number" if isinstance(default, int) else "a number"
        raise ValueError(f"{key}={text!r} should be {kind}") from None
    return text


def parse_recipe(text: str) -> RecipeText:
    """Read recipe text, ``NAME[:key=value,...]``.

    Raises:
        ValueError: an unknown name, key or value; the message lists the known ones.
    """
    name, _, tail = text.strip().partition(":")
    if name in ALIASES:
        name, _, given = ALIASES[name].partition(":")
        tail = f"{given},{tail}" if tail else given
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; known: {', '.join([*RECIPES, *ALIASES])}")
    found = RECIPES[name]
    options, common, keys = dict(found.defaults), dict(_COMMON), set()
    for part in filter(None, (piece.strip() for piece in tail.split(","))):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not value:
            raise ValueError(f"recipe {text!r}: {part!r} is not of the form key=value")
        target = options if key in options else common
        if key not in target:
            raise ValueError(f"recipe {name!r} has no option {key!r}; known: {', '.join([*options, *_COMMON])}")
        target[key] = _convert(key, value, target[key])
        keys.add(key)
    if common["grid"] is not None:
        grid_named(common["grid"])
    if common["afs"] not in _SOURCES:
        raise ValueError(f"unknown afs {common['afs']!r}; known: {', '.join(_SOURCES)}")
    if common["final"] not in ("zero", "sigma_min"):
        raise ValueError(f"unknown final {common['final']!r}; known: zero, sigma_min")
    found.steps(4, False, **options)  # options of the right type but outside their range fail here, before any use
    return RecipeText(found, options, common, frozenset(keys))


def recipe(text: str, noise_schedule: NoiseSchedule, nfe: int) -> SolverSchedule:
    """The solver schedule that ``text`` names, with ``nfe`` network evaluations.

    Args:
        text: ``NAME[:key=value,...]``, e.g. "unipc:order=3,grid=karras". Besides the recipe's own options every text takes
            grid, rho (of karras), shift (flow), final ("zero" or "sigma_min"), afs ("none", "zero_x0", "average_x0": an
            analytic first step) and clip ("none", "config" or a bound on abs(x0)).
        noise_schedule: where the times lie.
        nfe: network evaluations, >= 1.

    Raises:
        ValueError: an unknown name, key or value (the message lists the known ones), or an NFE below 1.
    """
    return parse_recipe(text).schedule(noise_schedule, nfe)

"""Recipe text, ``NAME[:key=value,...]``: read once, made into a solver schedule for any noise schedule and NFE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from ..noise import NoiseSchedule
from ..strategy import Evaluation, SolverSchedule
from .catalogue import ALIASES, RECIPES, Recipe, canonical
from .first_order import tcd_expand
from .grids import DEFAULT_GRIDS, RHO, TimeGrid, grid_named, times
from .midpoint import dpmpp_sde_expand, kdpm2_expand
from .restart import restart_expand

COMMON: dict[str, Any] = {
    "grid": None,
    "rho": RHO,
    "shift": None,
    "final": "zero",
    "afs": "none",
    "clip": "config",
    "inverse": False,
}
_SOURCES = ("none", "zero_x0", "average_x0")


@dataclass(frozen=True)
class RecipeText:
    """Parsed recipe text: a recipe with its options, ready for any noise schedule and NFE.

    Attributes:
        recipe: the solver.
        options: its own options, all of them.
        common: grid, rho, shift, final, afs, clip, inverse.
        given: the keys that the text sets.
    """

    recipe: Recipe
    options: Mapping[str, Any]
    common: Mapping[str, Any]
    given: frozenset[str]

    @property
    def names_grid(self) -> bool:
        """Whether the text asks for a grid, so that a caller's own times do not replace it."""
        return "grid" in self.given or self.common["inverse"]

    @property
    def analytic_first_step(self) -> bool:
        """Whether the first step needs no evaluation."""
        return bool(self.common["afs"] != "none")

    def macro_steps(self, noise_schedule: NoiseSchedule, nfe: int) -> int:
        """Steps of the grid that ``nfe`` evaluations pay for, an analytic first one included.

        Raises:
            ValueError: an NFE below 1, or too low for the recipe.
        """
        if isinstance(nfe, bool) or not isinstance(nfe, int) or nfe < 1:
            raise ValueError(f"nfe must be a whole number of at least 1, got {nfe!r}")
        return self.recipe.macro(noise_schedule, nfe, self.options) + self.analytic_first_step

    def schedule(self, noise_schedule: NoiseSchedule, nfe: int, *, at: tuple[float, ...] | None = None) -> SolverSchedule:
        """The solver schedule with ``nfe`` network evaluations.

        Args:
            noise_schedule: where the times lie.
            nfe: network evaluations, >= 1.
            at: times for the steps of the grid (`macro_steps` + 1 of them) instead of the grid's own.

        Raises:
            ValueError: an NFE that the recipe cannot spend, or times that do not fit.
        """
        common, n = self.common, self.macro_steps(noise_schedule, nfe)
        points = self._grid_times(noise_schedule, n) if at is None else tuple(at)
        if len(points) != n + 1:
            raise ValueError(f"{self.recipe.name} with {nfe} evaluations has {n + 1} grid times, got {len(points)}")
        budget = nfe + self.analytic_first_step
        if self.recipe.expand is not None:
            points = self.recipe.expand(noise_schedule, points, budget, self.options)
        if common["inverse"]:
            points = points[::-1]
        steps = self.recipe.steps(TimeGrid(noise_schedule, points, budget), **self.options)
        if self.analytic_first_step:
            first = msgspec.structs.replace(steps[0], eval=Evaluation(source=common["afs"]))
            steps = (first, *steps[1:])
        schedule = SolverSchedule(
            times=points,
            steps=steps,
            name=f"{self.recipe.name}-nfe{nfe}",
            path={"type": noise_schedule.kind, **noise_schedule.parameters},
            clip=common["clip"],
        )
        if common["inverse"] and schedule.stochastic:
            raise ValueError(f"{self.recipe.name} draws noise here, and the inverse direction (data to noise) must not")
        return schedule

    def _grid_times(self, noise: NoiseSchedule, n: int) -> tuple[float, ...]:
        common = self.common
        if common["shift"] is not None:
            if noise.kind != "flow":
                raise ValueError(f"shift belongs to flow models; this noise schedule is {noise.kind}")
            noise = NoiseSchedule.flow(common["shift"])
        # From data to noise the times start at t_min: at sigma = 0 there is nothing to predict yet.
        final = "sigma_min" if common["inverse"] else common["final"]
        return times(noise, grid_named(common["grid"] or DEFAULT_GRIDS[noise.family]), n, final, common["rho"])


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
    """Read recipe text; NAME may also be what other libraries call the solver.

    Raises:
        ValueError: an unknown name, key or value; the message lists the known ones.
    """
    named, _, tail = text.strip().partition(":")
    known = canonical(named)
    if known is None:
        raise ValueError(f"unknown recipe {named!r}; known: {', '.join([*RECIPES, *ALIASES])}")
    name, _, given = known.partition(":")
    found = RECIPES[name]
    options, common, keys = dict(found.defaults), dict(COMMON), set()
    for part in filter(None, (piece.strip() for piece in f"{given},{tail}".split(","))):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not value:
            raise ValueError(f"recipe {text!r}: {part!r} is not of the form key=value")
        target = options if key in options else common
        if key not in target:
            raise ValueError(f"recipe {name!r} has no option {key!r}; known: {', '.join([*options, *COMMON])}")
        target[key] = _convert(key, value, target[key])
        keys.add(key)
    if found.final is not None and "final" not in keys:
        common["final"] = found.final
    _check_common(text, found, options, common)
    # Options of the right type but outside their range fail here, before any use.
    found.steps(TimeGrid(NoiseSchedule.vp_linear(), (1.0, 0.7, 0.4, 0.1), 3), **options)
    return RecipeText(found, options, common, frozenset(keys))


def _check_common(text: str, found: Recipe, options: Mapping[str, Any], common: Mapping[str, Any]) -> None:
    if common["grid"] is not None:
        grid_named(common["grid"])
    if common["afs"] not in _SOURCES:
        raise ValueError(f"unknown afs {common['afs']!r}; known: {', '.join(_SOURCES)}")
    if common["final"] not in ("zero", "sigma_min"):
        raise ValueError(f"unknown final {common['final']!r}; known: zero, sigma_min")
    if not common["rho"] > 0:
        raise ValueError(f"rho must be positive, got {common['rho']}")
    if common["shift"] is not None and not common["shift"] > 0:
        raise ValueError(f"shift must be positive, got {common['shift']}")
    jumps = found.expand in (tcd_expand, restart_expand, dpmpp_sde_expand) or (found.expand is kdpm2_expand and options["eta"])
    if common["inverse"] and (common["afs"] != "none" or jumps):
        raise ValueError(f"recipe {text!r}: the inverse direction has no analytic first step and no jumps in time")


def recipe(text: str, noise_schedule: NoiseSchedule, nfe: int) -> SolverSchedule:
    """The solver schedule that ``text`` names, with ``nfe`` network evaluations.

    Args:
        text: ``NAME[:key=value,...]``, e.g. "unipc:order=3,grid=karras". Besides the recipe's own options every text takes
            grid, rho (of karras), shift (flow), final ("zero" or "sigma_min"), afs ("none", "zero_x0", "average_x0": an
            analytic first step), clip ("none", "config" or a bound on abs(x0)) and inverse (from data to noise).
        noise_schedule: where the times lie.
        nfe: network evaluations, >= 1.

    Raises:
        ValueError: an unknown name, key or value (the message lists the known ones), or an NFE that cannot be spent.
    """
    return parse_recipe(text).schedule(noise_schedule, nfe)

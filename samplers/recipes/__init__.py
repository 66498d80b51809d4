"""Recipes: a name and an NFE make a solver schedule. A new solver is a function here, not a class anywhere."""

from .catalogue import ALIASES, RECIPES, Recipe, canonical
from .grids import GRIDS, TimeGrid
from .text import RecipeText, parse_recipe, recipe

__all__ = ["ALIASES", "GRIDS", "RECIPES", "Recipe", "RecipeText", "TimeGrid", "canonical", "parse_recipe", "recipe"]

"""Write docs/solvers.md: every recipe with what it declares, what others call it, and its measured local order.

    python docs/build.py                    write the page
    python docs/build.py --check            exit code 1 when the page is stale; measured orders may differ by 0.1
    python docs/build.py --check --names    the same without measuring

Everything comes from the recipes themselves, so a recipe that is added appears here by itself.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import msgspec
import torch

from samplers import RECIPES, NoiseSchedule, StepStrategy, parse_recipe, recipe
from samplers.recipes import ALIASES, GRIDS, Recipe
from samplers.testing import local_order

PAGE = Path(__file__).parent / "solvers.md"
PLACES = ("diffusers", "k-diffusion", "ComfyUI", "A1111")
TOLERANCE = 0.1
NOISE = NoiseSchedule.vp_linear()
NFE = 13
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
MEASURED = re.compile(r"(?<=\| )-?\d+\.\d\d(?= \|)")  # a table cell that is a number with two digits

Measure = Callable[[Sequence[StepStrategy], str], float]


# ---- measuring -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """One setting of a recipe: its shortest text, its other names, and what it declares and measures."""

    text: str
    names: tuple[str, ...]
    declared: int | None
    predicted: float | None
    corrected: float | None

    def cells(self) -> tuple[str, str, str]:
        """Declared order, measured order, measured order of the corrected state."""
        if self.declared is None:
            return "stochastic", "", ""
        return str(self.declared), *("" if value is None else f"{value:.2f}" for value in (self.predicted, self.corrected))


def measured_order(steps: Sequence[StepStrategy], order_grid: str) -> float:
    """Local order of the last of ``steps`` on the grid for which the recipe declares it."""
    return local_order(steps, NOISE, grid="sigma" if order_grid == "even-sigma" else "lambda")


def not_measured(steps: Sequence[StepStrategy], order_grid: str) -> float:
    """Stands in for a measurement where only names matter."""
    return 0.0


def full_steps(text: str, found: Recipe) -> tuple[StepStrategy, ...]:
    """A recipe's steps up to the first of full order."""
    extra = ["final=sigma_min", *(["lower_order_final=false"] if "lower_order_final" in found.defaults else [])]
    steps = recipe(f"{text}{',' if ':' in text else ':'}{','.join(extra)}", NOISE, NFE).steps

    def rank(i: int) -> tuple[int, int, int]:
        corrector = steps[i].corr
        return -steps[i].start, steps[i].order, 0 if corrector is None else corrector.order

    ends = [i for i in range(len(steps) - 1) if steps[i + 1].start == -1]  # ends of blocks, the run's own left out
    best = max(map(rank, ends))
    return steps[: next(i for i in ends if rank(i) == best) + 1]


def variant(text: str, names: tuple[str, ...], found: Recipe, measure: Measure) -> Variant:
    """Measure one recipe text, if it is deterministic."""
    declared = found.order(parse_recipe(text).options)
    if declared is None:
        return Variant(text, names, None, None, None)
    steps = full_steps(text, found)
    last = steps[-1]
    corrected = None if last.corr is None else measure(steps, found.order_grid)
    if last.corr is not None and last.corr.reeval:  # the corrected state is the one that goes on
        return Variant(text, names, declared, corrected, None)
    bare = (*steps[:-1], msgspec.structs.replace(last, corr=None))
    return Variant(text, names, declared, measure(bare, found.order_grid), corrected)


def texts(found: Recipe) -> Iterator[str]:
    """The settings worth a row: every order, every switch that changes the full step, the deterministic limit."""
    name, defaults = found.name, found.defaults
    yield name
    orders = [o for o in range(1, 7) if "order" in defaults and _is_valid(f"{name}:order={o}")]
    if found.order(defaults) is None:
        switches = [f"{key}=0" for key, value in defaults.items() if isinstance(value, float) and value != 0]
        settings = [f"{name}:{s}" for s in switches] + [f"{name}:order={o},{s}" for s in switches for o in orders]
        yield from (text for text in settings if _is_valid(text) and found.order(parse_recipe(text).options) is not None)
        return
    yield from (f"{name}:order={o}" for o in orders)
    base = f"{name}:order={orders[-1]}," if orders else f"{name}:"
    for key, value in defaults.items():
        flipped = f"{base}{key}={str(not value).lower()}"
        if isinstance(value, bool) and full_steps(flipped, found) != full_steps(base.rstrip(",:"), found):
            yield flipped


def _is_valid(text: str) -> bool:
    try:
        parse_recipe(text)
    except ValueError:
        return False
    return True


def variants(found: Recipe, measure: Measure) -> list[Variant]:
    """Rows of a recipe's table: its settings and those that have a name, each once."""
    rows: dict[str, tuple[str, list[str]]] = {}
    for text in texts(found):
        rows.setdefault(_key(text), (text, []))
    for alias, text in ALIASES.items():
        if parse_recipe(text).recipe.name == found.name:
            rows.setdefault(_key(text), (text, []))[1].append(alias)
    return [variant(text, tuple(names), found, measure) for text, names in rows.values()]


def _key(text: str) -> str:
    parsed = parse_recipe(text)
    return repr((parsed.recipe.name, sorted(parsed.options.items()), sorted(parsed.common.items(), key=str)))


# ---- the page ------------------------------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown table."""
    lines = [f"| {' | '.join(header)} |", f"| {' | '.join('---' for _ in header)} |"]
    return [*lines, *(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)]


def linked(text: str) -> str:
    """Documentation as markdown: arXiv numbers as links, code in single backticks."""
    return ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", text.replace("``", "`"))


def documentation(function: Any) -> tuple[str, dict[str, str]]:
    """A docstring's prose, and the descriptions of its arguments."""
    function = function.func if isinstance(function, partial) else function
    prose, _, rest = (inspect.getdoc(function) or "").partition("\nArgs:\n")
    block = textwrap.dedent(rest.partition("\n\n")[0])
    arguments: dict[str, str] = {}
    for line in block.splitlines():
        if line[:1].strip():
            key, _, description = line.partition(":")
            arguments[key] = description.strip()
        elif arguments:
            arguments[next(reversed(arguments))] += " " + line.strip()
    return re.split(r"\n(?:Raises|Returns):\n", prose)[0].strip(), arguments


def span(values: Sequence[float]) -> str:
    """One number, or the lowest and the highest."""
    low, high = f"{min(values):g}", f"{max(values):g}"
    return low if low == high else f"{low}-{high}"


def overview(found: Recipe, rows: Sequence[Variant]) -> tuple[str, ...]:
    """A recipe's row in the first table."""
    declared = [row.declared for row in rows if row.declared is not None]
    order = span(declared) if declared else ""
    if any(row.declared is None for row in rows):
        order = f"{order}, stochastic" if order else "stochastic"
    if found.order_grid != "any":
        order += f" on {found.order_grid} grids"
    documents = (inspect.getdoc(found.steps), inspect.getdoc(inspect.getmodule(found.steps)))
    source = next((dict.fromkeys(ids) for text in documents if (ids := ARXIV.findall(text or ""))), {})
    links = ", ".join(f"[{number}](https://arxiv.org/abs/{number})" for number in source)
    names = [found.known_as.get(place, "") for place in PLACES]
    return (f"[`{found.name}`](#{found.name})", order, str(found.nfe_per_step), links, *names)


def section(found: Recipe, rows: Sequence[Variant]) -> Iterator[str]:
    """A recipe's own section."""
    prose, arguments = documentation(found.steps)
    yield from (f"## {found.name}", "", linked(prose), "")
    if found.defaults:
        options = [
            (f"`{key}`", f"`{_as_text(value)}`", linked(arguments.get(key, ""))) for key, value in found.defaults.items()
        ]
        yield from (*table(("option", "default", "meaning"), options), "")
    header = ("recipe text", "also accepted as", "declared order", "measured", "measured, corrected")
    cells = [(f"`{row.text}`", ", ".join(f"`{name}`" for name in row.names), *row.cells()) for row in rows]
    if not any(cell[4] for cell in cells):
        header, cells = header[:4], [cell[:4] for cell in cells]
    yield from (*table(header, cells), "")


def _as_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def page(measure: Measure = measured_order) -> str:
    """The whole page."""
    rows = {name: variants(found, measure) for name, found in RECIPES.items()}
    lines = [
        "# Solvers",
        "",
        "<!-- Written by docs/build.py from the recipes; edit those. -->",
        "",
        "A recipe is a name that makes a solver schedule for any number of network evaluations: `unipc:order=3,grid=karras`.",
        "What others call a solver is accepted too. *Declared order* p means that one step's error is of order p + 1.",
        "*Measured* is the slope of that error over the step's width, less 1, with an exact history: in float64, on Gaussian",
        "data (whose ODE has a closed form), over widths from 0.02 to 0.057 in lambda = log(alpha / sigma), on the VP linear",
        "noise schedule. *Corrected* is the same after the corrector. Stochastic recipes have no local order in this sense.",
        "",
        "Reproduce with `python docs/build.py`.",
        "",
        *table(
            ("recipe", "order", "NFE per step", "source", *PLACES),
            [overview(found, rows[name]) for name, found in RECIPES.items()],
        ),
        "",
    ]
    for name, found in RECIPES.items():
        lines += section(found, rows[name])
    grids = [(f"`{name}`", linked(documentation(grid)[0].splitlines()[0])) for name, grid in GRIDS.items()]
    lines += ["## Time grids", "", "`grid=` in any recipe text.", "", *table(("grid", "points"), grids)]
    return "\n".join(lines) + "\n"


def differences(built: str, written: str, tolerance: float) -> list[str]:
    """Lines in which the two pages differ, measured orders by more than ``tolerance``."""
    out = []
    for new, old in zip_longest(built.splitlines(), written.splitlines(), fillvalue=""):
        apart = [abs(float(a) - float(b)) for a, b in zip(MEASURED.findall(new), MEASURED.findall(old), strict=False)]
        if MEASURED.sub("#", new) != MEASURED.sub("#", old) or any(gap > tolerance + 1e-9 for gap in apart):
            out.append(f"- {old}\n+ {new}")
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the page instead of writing it")
    parser.add_argument("--names", action="store_true", help="with --check: leave the measured orders out")
    options = parser.parse_args(arguments)
    if options.names and not options.check:
        parser.error("--names only makes sense with --check")
    torch.set_num_threads(1)
    if not options.check:
        PAGE.write_text(page())
        return 0
    built = page(not_measured if options.names else measured_order)
    stale = differences(built, PAGE.read_text() if PAGE.is_file() else "", float("inf") if options.names else TOLERANCE)
    for difference in stale:
        print(difference, file=sys.stderr)
    if stale:
        print(f"{PAGE.name} is stale in {len(stale)} lines: run python docs/build.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())

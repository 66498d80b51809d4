"""What the commands share: consoles, exit codes, progress bars, and the options of commands that run a model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from ..evaluation import Conditioning

USAGE, MISSING, INCOMPLETE = 2, 3, 4  # exit codes; 0 is success

out_console, err_console = Console(), Console(stderr=True)

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of a table.")]
SamplerArgument = Annotated[str, typer.Argument(help="Recipe text, path of a JSON schedule, or a shipped name.")]

ModelOption = Annotated[str, typer.Option("--model", help="Reference pipeline, diffusers folder or hub id.")]
PromptOption = Annotated[str | None, typer.Option("--prompt", help="Text prompt.")]
PromptsOption = Annotated[Path | None, typer.Option("--prompts", help="File with one prompt a line; images take them in turn.")]
ClassLabelsOption = Annotated[
    str | None, typer.Option("--class-labels", help="Comma-separated classes; images take them in turn.")
]
GuidanceOption = Annotated[float | None, typer.Option("--guidance", help="Guidance scale.")]
HeightOption = Annotated[int | None, typer.Option("--height", min=1)]
WidthOption = Annotated[int | None, typer.Option("--width", min=1)]
DeviceOption = Annotated[str, typer.Option("--device", help="Torch device.")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="float32, float16 or bfloat16.")]
BatchSizeOption = Annotated[int, typer.Option("--batch-size", min=1)]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of image 0; image i has seed + i.")]
OfflineOption = Annotated[bool, typer.Option("--offline", help="Never reach for the hub.")]


def progress_bar() -> Progress:
    """A progress bar with counts and remaining time, on stderr."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=err_console)


def integers(option: str, text: str | None) -> tuple[int, ...]:
    """Whole numbers of a comma-separated option; none for no text.

    Raises:
        ValueError: naming the option and what it got.
    """
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise ValueError(f"{option} {text!r}: expected comma-separated whole numbers") from None


def numbers(option: str, text: str | None) -> tuple[float, ...]:
    """Finite numbers of a comma-separated option; none for no text.

    Raises:
        ValueError: naming the option and what it got.
    """
    try:
        found = tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        found = (math.nan,)
    if not all(map(math.isfinite, found)):
        raise ValueError(f"{option} {text!r}: expected comma-separated numbers")
    return found


def conditioning(
    prompt: str | None = None,
    prompts: Path | None = None,
    class_labels: str | None = None,
    guidance: float | None = None,
    height: int | None = None,
    width: int | None = None,
) -> Conditioning:
    """The shared options as one `Conditioning`.

    Raises:
        ValueError: ``class_labels`` are not numbers.
        FileNotFoundError: no file ``prompts``.
    """
    from ..evaluation import Conditioning

    texts = tuple(filter(None, prompts.read_text().splitlines())) if prompts else (prompt,) if prompt else ()
    return Conditioning(texts, integers("--class-labels", class_labels), guidance, height, width)

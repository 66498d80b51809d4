"""Quality against NFE, one line a sampler, and grids of the same seeds."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from .results import Record
from .tables import HIGHER_IS_BETTER, label, metrics_of

MARKERS = "osD^vPX*<>"


def quality_figure(group: Sequence[Record], metric: str | None = None) -> Figure:
    """The metric against NFE of records that may be compared, with the floor.

    Args:
        group: of one protocol.
        metric: the first one by default.
    """
    metric = metric or metrics_of(group)[0]
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axis = figure.add_subplot()
    nfes = sorted({record["nfe"] for record in group})
    markers = cycle(MARKERS)
    for sampler in dict.fromkeys(record["sampler"] for record in group):
        line = sorted((r for r in group if r["sampler"] == sampler and metric in r["mean"]), key=lambda r: r["nfe"])
        errors = [record["std"].get(metric) or 0.0 for record in line]
        values = [record["mean"][metric] for record in line]
        style = "--" if sampler.startswith("diffusers:") else "-"
        axis.errorbar([r["nfe"] for r in line], values, errors, fmt=style, marker=next(markers), capsize=3, label=sampler)
    if all(record["mean"].get(metric, 1) > 0 for record in group) and metric not in HIGHER_IS_BETTER:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
    floor = group[0]["floor"]
    if floor and metric in ("fid", "fd"):
        axis.axhline(floor["value"], color="0.4", linestyle=":", label=f"real against real, {floor['n']} images")
    axis.set_xlabel("network evaluations")
    axis.set_ylabel(label(metric, group[0]).replace(" (lower is better)", ""), fontsize=9)
    axis.set_xticks(nfes)
    axis.grid(alpha=0.3)
    handles, labels = axis.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: labels[i].startswith("real against real"))
    axis.legend([handles[i] for i in order], [labels[i] for i in order], fontsize=8)
    return figure


def save_figure(figure: Figure, stem: Path) -> None:
    """Write ``stem``.png and ``stem``.svg."""
    FigureCanvasAgg(figure).print_figure(stem.with_suffix(".png"), dpi=150)
    FigureCanvasSVG(figure).print_figure(stem.with_suffix(".svg"))


def figure_uri(figure: Figure) -> str:
    """A figure as a data URI."""
    buffer = io.BytesIO()
    FigureCanvasSVG(figure).print_figure(buffer, format="svg")
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def grid_uri(images: Tensor, columns: int = 8, *, smallest: int = 24) -> str:
    """Images (k, C, H, W) uint8 as one picture in a data URI; small ones are enlarged without smoothing."""
    scale = max(1, -(-smallest // images.shape[-1]))
    big = images.repeat_interleave(scale, dim=-1).repeat_interleave(scale, dim=-2)
    array = make_grid(big, nrow=columns, padding=scale, pad_value=255).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

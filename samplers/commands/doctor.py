"""``fewstep doctor``."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from pathlib import Path

import typer
from rich.table import Table

from .common import JsonOption, out_console


def doctor(as_json: JsonOption = False) -> None:
    """What is installed, which weights are where, what is missing and how to get it."""
    import torch

    from .. import reference, shipped_schedules

    packages = ("fewstep", "torch", "torchvision", "diffusers", "transformers", "torchmetrics", "scikit-learn", "optuna")
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    cache = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface")) / "hub"
    report = {
        "python": platform.python_version(),
        "packages": found,
        "devices": ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        + (["mps"] if torch.backends.mps.is_available() else []),
        "reference_pipelines": reference.names(),
        "schedules": sorted(shipped_schedules()),
        "hub_models": sorted(p.name.removeprefix("models--").replace("--", "/") for p in cache.glob("models--*")),
    }
    report["inception_weights"] = _inception_weights()
    if as_json:
        typer.echo(json.dumps(report))
        return
    table = Table("what", "found", "if missing")
    table.add_row("python", report["python"], "")
    for name, version in found.items():
        table.add_row(name, version or "[red]not installed[/]", "" if version else f"pip install {name}")
    table.add_row("devices", ", ".join(report["devices"]), "")
    table.add_row("reference pipelines", ", ".join(report["reference_pipelines"]) or "none", "reinstall fewstep")
    table.add_row("schedules", ", ".join(report["schedules"]) or "none", "")
    table.add_row("hub models", ", ".join(report["hub_models"]) or "none", f"downloaded on first use into {cache}")
    weights = report["inception_weights"]
    table.add_row("Inception weights", weights["path"] or "none", weights["advice"])
    out_console.print(table)


def _inception_weights() -> dict[str, str | None]:
    """Where the weights of FID are and whether they are the published ones, or how to get them."""
    from ..evaluation import MissingModelError
    from ..evaluation.features.weights import INCEPTION, find_weights, sha256

    try:
        path = find_weights(INCEPTION, offline=True)
    except MissingModelError as error:
        return {"path": None, "advice": str(error)}
    published = sha256(path) == INCEPTION.sha256
    return {"path": str(path), "advice": "" if published else "not the published weights: another SHA-256"}

"""``fewstep minority``: find the rare images of a data set, train a classifier of rarity, sample rare images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import (
    BatchSizeOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    OfflineOption,
    PromptOption,
    SeedOption,
    out_console,
    progress_bar,
)

if TYPE_CHECKING:
    from ..evaluation import ModelInputs
    from ..guidance import MinorityScorer

app = typer.Typer(help=__doc__.split(": ", 1)[1], no_args_is_help=True)

DataOption = Annotated[str, typer.Option("--data", help="Images: folder, zip, npz, digits, torchvision:..., datasets:...")]


@app.command()
def score(
    data: DataOption,
    out: Annotated[Path, typer.Option(help="Folder for scores, contact sheet and histogram; an interrupted run is completed.")],
    model: ModelOption = "digits",
    level: Annotated[str, typer.Option(help="'auto', or the share of signal alpha_bar in (0, 1).")] = "auto",
    target: Annotated[str, typer.Option(help="What 'auto' looks for: mode (rare kinds) or typicality.")] = "mode",
    draws: Annotated[int, typer.Option(min=1, help="Noises per image.")] = 16,
    distance: Annotated[str, typer.Option(help="l2, l1 or lpips.")] = "l2",
    sheet: Annotated[int, typer.Option(min=1, help="Images on the contact sheet.")] = 100,
    prompt: PromptOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    batch_size: BatchSizeOption = 64,
    seed: SeedOption = 0,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Score how rare every image of a data set is, and show the rarest: look at them before guiding anything."""
    import torch

    from .. import evaluation, guidance
    from .minority_report import score_figure

    inputs, scorer = _scorer(
        model, data, level=_level(level), target=target, draws=draws, distance=distance, prompt=prompt,
        device=device, dtype=dtype, batch_size=batch_size, offline=offline,
    )  # fmt: skip
    scorer, variance = _calibrated(scorer, inputs, seed)
    out.mkdir(parents=True, exist_ok=True)
    identity = {"model": model, "data": data, "data_id": inputs.source.id, "prompt": prompt, "dtype": dtype}
    identity |= {"top_variance": variance, "target": target}
    with progress_bar() as bar:
        task = bar.add_task("scoring", total=len(inputs))
        scores = guidance.score_dataset(
            scorer, inputs, batch_size=batch_size, seed=seed, device=device, path=out / "scores.safetensors",
            identity=identity, progress=lambda done: bar.update(task, completed=done),
        )  # fmt: skip
    if not bool(torch.isfinite(scores).all()):
        raise ValueError(
            f"{int((~torch.isfinite(scores)).sum())} scores are not finite: use --dtype float32 or a higher --level"
        )
    order = scores.argsort(descending=True, stable=True)
    top, bottom = order[:sheet].tolist(), order.flip(0)[:sheet].tolist()
    scale = max(1, 48 // max(inputs.size))
    evaluation.save_grid(inputs.images(top), out / "rarest.png", columns=min(10, len(top)), scale=scale)
    evaluation.save_grid(inputs.images(bottom), out / "commonest.png", columns=min(10, len(bottom)), scale=scale)
    score_figure({"data": scores}, out / "scores.png")
    record = {
        "images": len(scores), "level": scorer.level, "top_variance": variance, "draws": draws, "distance": distance,
        "quantiles": {str(q): scores.quantile(q).item() for q in (0.1, 0.5, 0.9, 0.99)} if len(scores) < 2**24 else {},
        "rarest": [{"image": i, "score": scores[i].item()} for i in top[:20]], "out": str(out),
    }  # fmt: skip
    _write(out / "score.json", record)
    if as_json:
        typer.echo(json.dumps(record))
        return
    out_console.print(f"{len(scores)} images scored at alpha_bar {scorer.level:.4g}: {out / 'scores.safetensors'}")
    out_console.print(f"look at {out / 'rarest.png'} before training: damaged or mislabelled images also score as rare")


@app.command()
def train(
    scores: Annotated[Path, typer.Option(help="scores.safetensors of fewstep minority score.")],
    out: Annotated[Path, typer.Option(help="Classifier file to write (.safetensors); an interrupted training continues.")],
    bins: Annotated[int, typer.Option(min=2, help="Classes of equal counts.")] = 10,
    parts: Annotated[
        int, typer.Option(min=1, help="Kinds into which the rarest class is split; 1 is the published method.")
    ] = 6,
    steps: Annotated[int, typer.Option(min=1)] = 2000,
    train_batch: Annotated[int, typer.Option(min=1, help="Images per training step.")] = 256,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    patience: Annotated[int, typer.Option(min=0, help="Looks without improvement before stopping; 0 never.")] = 0,
    flip: Annotated[bool, typer.Option(help="Mirror images at random.")] = False,
    network: Annotated[str, typer.Option(help="auto, mlp or unet.")] = "auto",
    width: Annotated[int | None, typer.Option(min=1)] = None,
    depth: Annotated[int | None, typer.Option(min=1)] = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    seed: SeedOption = 0,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train the classifier of rarity on scored images."""
    import torch

    from .. import guidance

    values, settings = guidance.read_scores(scores)
    inputs, scorer = _scorer(
        settings["model"], settings["data"], level=settings["level"], target=settings["target"], draws=settings["draws"],
        distance={"squared_error": "l2", "absolute_error": "l1"}.get(settings["distance"], "lpips"),
        prompt=settings["prompt"], device=device, dtype=dtype, batch_size=256, offline=offline,
    )  # fmt: skip
    if inputs.source.id != settings["data_id"]:
        raise ValueError(f"the images of {settings['data']} are not those that were scored: score them again")
    labels = guidance.equal_count_bins(values, bins)
    classifier = guidance.MinorityClassifier(
        inputs[[0]].shape[1:], bins, parts=parts, network=network, width=width, depth=depth, seed=seed
    ).to(device)
    fit_settings = guidance.FitSettings(
        steps=steps, batch_size=train_batch, lr=lr, patience=patience or None, flip=flip, seed=seed
    )
    with progress_bar() as bar:
        if parts > 1:
            rows = (labels == bins - 1).nonzero().flatten().split(256)
            task = bar.add_task("splitting the rarest class", total=len(rows))
            residuals = [
                _residuals(scorer, inputs, part, device, seed + i) for i, part in enumerate(bar.track(rows, task_id=task))
            ]
            import torch

            labels = guidance.split_rarest(labels, torch.cat(residuals), parts, seed=seed)
        task = bar.add_task("training", total=steps)
        checkpoint = out.with_name(out.name + ".checkpoint")
        out.parent.mkdir(parents=True, exist_ok=True)
        report = guidance.fit(
            classifier, inputs, labels, scorer.noise_schedule, fit_settings, checkpoint=checkpoint,
            progress=lambda step, loss: bar.update(task, completed=step, description=f"training, loss {loss:.3f}"),
        )  # fmt: skip
    classifier.facts = {"scores": settings, "fit": {**vars(report)}, "rarest_parts": (labels >= bins - 1).sum().item()}
    classifier.save(out)
    checkpoint.unlink(missing_ok=True)
    record = {"out": str(out), "bins": bins, "parts": parts, **vars(report)}
    if as_json:
        typer.echo(json.dumps(record))
        return
    held = "" if report.validation_loss is None else f"; held-out loss {report.validation_loss:.3f} nats"
    out_console.print(f"{out}: {report.steps} steps, weights of step {report.best_step}{held}")


@app.command()
def sample(
    classifier: Annotated[Path, typer.Option(help="Classifier file of fewstep minority train.")],
    nfe: Annotated[int, typer.Option(min=1, help="Network evaluations per image.")],
    out: Annotated[Path, typer.Option(help="Folder for images and report; an interrupted run in it is completed.")],
    sampler: Annotated[str, typer.Option(help="Recipe text, path of a JSON schedule, or a shipped name.")] = "ddpm",
    num: Annotated[int, typer.Option(min=1, help="Images, guided and as many unguided.")] = 100,
    scale: Annotated[float, typer.Option(help="Guidance scale.")] = 4.0,
    label: Annotated[str, typer.Option(help="Bin (-1 the rarest, 0 the commonest), 'each', or 'part:K,K'.")] = "-1",
    window: Annotated[str, typer.Option(help="low,high in alpha_bar: where guidance acts.")] = "0,1",
    rejection: Annotated[int, typer.Option(min=0, help="Also draw so many times more images and keep the rarest.")] = 0,
    reference: Annotated[int, typer.Option(min=100, help="Real images to compare with.")] = 2000,
    protocol: Annotated[str, typer.Option(help="Features to compare in.")] = "fd-pixel",
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    batch_size: BatchSizeOption = 64,
    seed: SeedOption = 0,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Sample towards the rare images, and report what came of it beside unguided samples (and rejection)."""
    from ..guidance import MinorityClassifier
    from .minority_report import write_report
    from .minority_sampling import SampleRequest, compare_sets, sample_sets

    low, _, high = window.partition(",")
    try:
        bounds, chosen = (float(low), float(high)), label if not label.lstrip("-").isdecimal() else int(label)
    except ValueError:
        raise ValueError(f"--window {window!r}: expected low,high in alpha_bar") from None
    found = MinorityClassifier.load(classifier)
    request = SampleRequest(sampler, nfe, num, scale, chosen, bounds, rejection, batch_size, seed)
    settings = found.facts.get("scores")
    if settings is None:
        raise ValueError(f"{classifier} does not say which model and data it belongs to; train it with fewstep minority train")
    inputs, scorer, pipe = _scorer(
        settings["model"], settings["data"], level=settings["level"], target=settings["target"], draws=settings["draws"],
        distance={"squared_error": "l2", "absolute_error": "l1"}.get(settings["distance"], "lpips"),
        prompt=settings["prompt"], device=device, dtype=dtype, batch_size=batch_size, offline=offline, with_pipe=True,
    )  # fmt: skip
    if len(inputs) < 100:
        raise ValueError(
            f"the report compares with the rare tenth of at least 100 images; {settings['data']} has {len(inputs)}"
        )
    with progress_bar() as bar:
        sets = sample_sets(pipe, found, request, settings, scorer, inputs, out, bar)
        result = compare_sets(sets, inputs, scorer, out, reference=reference, protocol=protocol, seed=seed, bar=bar)
    record = {"settings": {"classifier": str(classifier), **request.to_dict()}, **result}
    _write(out / "minority.json", record)
    write_report(record, out)
    if as_json:
        typer.echo(json.dumps(record))
    else:
        out_console.print(f"report: {out / 'report.html'}   numbers: {out / 'minority.json'}")


def _level(text: str) -> str | float:
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise ValueError(f"--level {text!r}: expected 'auto' or alpha_bar in (0, 1)") from None


def _scorer(
    model: str, data: str, *, level: str | float, target: str | None, draws: int, distance: str, prompt: str | None,
    device: str, dtype: str, batch_size: int, offline: bool, with_pipe: bool = False,
) -> Any:  # fmt: skip
    """The images as the model takes them, and the scorer of that model (and the pipeline)."""
    from .. import evaluation, guidance
    from ..denoisers import from_pipeline
    from ..noise import NoiseSchedule

    pipe = evaluation.load_pipeline(model, device=device, dtype=dtype, offline=offline)
    inputs = evaluation.inputs_for(pipe, evaluation.open_images(data))
    denoiser, _, _ = from_pipeline(pipe, chunk=batch_size, **_condition(pipe, prompt))
    noise = NoiseSchedule.from_config(pipe.scheduler.config)
    clip = 1.0 if inputs.encode is None and pipe.scheduler.config.get("clip_sample") else None
    scorer = guidance.MinorityScorer(denoiser, noise, level, draws, distance, target=target or "mode", clip=clip)
    return (inputs, scorer, pipe) if with_pipe else (inputs, scorer)


def _condition(pipe: Any, prompt: str | None) -> dict[str, Any]:
    """Arguments of an unconditional call: the empty prompt, or the class that means "no class"."""
    import inspect

    accepted = inspect.signature(pipe.__call__).parameters
    if prompt is not None and "prompt" not in accepted:
        raise ValueError(f"--prompt does not apply: {type(pipe).__name__} takes no prompt")
    given: dict[str, Any] = {"guidance_scale": 1.0} if "guidance_scale" in accepted else {}
    if "prompt" in accepted:
        given["prompt"] = [prompt or ""]
    elif "class_labels" in accepted:
        config = (getattr(pipe, "unet", None) or pipe.transformer).config
        classes = getattr(config, "num_class_embeds", None)
        given["class_labels"] = [classes - 1 if classes else config.num_embeds_ada_norm]
    return given


def _calibrated(scorer: MinorityScorer, inputs: ModelInputs, seed: int) -> tuple[MinorityScorer, float]:
    """The scorer with its level fixed on up to 2000 of the images, and their top variance."""
    import torch

    from ..guidance import top_eigenvalue

    rows = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))[:2000].tolist()
    x0 = torch.cat([inputs[rows[i : i + 64]].cpu() for i in range(0, len(rows), 64)])
    return scorer.calibrated(x0), top_eigenvalue(x0)


def _residuals(scorer: MinorityScorer, inputs: ModelInputs, rows: Any, device: str, seed: int) -> Any:
    import torch

    return scorer.residuals(inputs[rows.tolist()].to(device), torch.Generator().manual_seed(seed)).cpu()


def _write(path: Path, record: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(path)

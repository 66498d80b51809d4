"""``fewstep minority``: find the rare images of a data set, train a classifier of rarity, sample rare images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import (
    BatchSizeOption,
    ClassLabelsOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    OfflineOption,
    PromptOption,
    SeedOption,
    integers,
    out_console,
    progress_bar,
)

app = typer.Typer(help=__doc__.split(": ", 1)[1], no_args_is_help=True)

LABEL_HELP = (
    "Bin (-1 the rarest, 0 the commonest); kinds in turn: 'each', 'part:K,K', or 'missing:K', the K kinds that the unguided "
    "images have too little of (a few hundred images tell)."
)
DataOption = Annotated[str, typer.Option("--data", help="Images: folder, zip, npz, digits, torchvision:..., datasets:...")]


@app.command()
def score(
    data: DataOption,
    out: Annotated[Path, typer.Option(help="Folder for scores, contact sheet and histogram; an interrupted run is completed.")],
    model: ModelOption = "digits",
    level: Annotated[str, typer.Option(help="'auto', or the share of signal alpha_bar in (0, 1).")] = "auto",
    target: Annotated[str, typer.Option(help="What 'auto' looks for: mode (rare kinds) or typicality.")] = "mode",
    draws: Annotated[int, typer.Option(min=1, help="Noises per image.")] = 16,
    distance: Annotated[str, typer.Option(help="l2, l1, lpips, or features: what the model's own blocks see.")] = "l2",
    sheet: Annotated[int, typer.Option(min=1, help="Images on the contact sheet.")] = 100,
    within_class: Annotated[
        bool, typer.Option("--within-class", help="Rare for its class: class-conditional model, images whose class is known.")
    ] = False,
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

    from .. import guidance
    from .minority_alike import numbered_sheet
    from .minority_report import save_sheets, score_figure
    from .minority_setup import load_whitening, open_setup

    setup = open_setup(
        model, data, level=_level(level), target=target, draws=draws, distance=distance, prompt=prompt,
        within_class=within_class, device=device, dtype=dtype, batch_size=batch_size, offline=offline,
    )  # fmt: skip
    inputs, classes = setup.inputs, setup.classes
    scorer, variance = setup.calibrated(seed)
    out.mkdir(parents=True, exist_ok=True)
    identity = {"model": model, "data": data, "data_id": inputs.source.id, "prompt": prompt, "dtype": dtype}
    identity |= {"top_variance": variance, "target": target} | ({"within_class": True} if within_class else {})
    with progress_bar() as bar:
        if distance == "features":
            task = bar.add_task("whitening the features", total=None)
            advance = lambda done, total: bar.update(task, completed=done, total=total)  # noqa: E731
            scorer = scorer.whitened(
                load_whitening(out, setup.with_scorer(scorer), {**scorer.settings, **identity}, device, seed, advance)
            )
        task = bar.add_task("scoring", total=len(inputs))
        scores = guidance.score_dataset(
            scorer, inputs, batch_size=batch_size, seed=seed, device=device, path=out / "scores.safetensors",
            identity=identity, class_labels=classes, progress=lambda done: bar.update(task, completed=done),
        )  # fmt: skip
    if not bool(torch.isfinite(scores).all()):
        raise ValueError(
            f"{int((~torch.isfinite(scores)).sum())} scores are not finite: use --dtype float32 or a higher --level"
        )
    top = save_sheets(inputs, scores, classes, sheet, out)
    numbered_sheet(inputs, top[:sheet], out / "rarest-numbered.png")
    score_figure({"data": scores}, out / "scores.png")
    record = {
        "images": len(scores), "level": scorer.level, "top_variance": variance, "draws": draws, "distance": distance,
        "quantiles": {str(q): scores.quantile(q).item() for q in (0.1, 0.5, 0.9, 0.99)} if len(scores) < 2**24 else {},
        "rarest": [{"image": i, "score": scores[i].item()} for i in top[:20]], "within_class": within_class,
        "out": str(out),
    }  # fmt: skip
    _write(out / "score.json", record)
    if as_json:
        typer.echo(json.dumps(record))
        return
    rows = " (one row per class)" if within_class else ""
    out_console.print(f"{len(scores)} images scored at alpha_bar {scorer.level:.4g}: {out / 'scores.safetensors'}")
    out_console.print(f"look at {out / 'rarest.png'}{rows} before training: damaged or mislabelled images also score as rare")


@app.command(name="alike")
def find_alike(
    scores: Annotated[Path, typer.Option(help="scores.safetensors of fewstep minority score.")],
    images: Annotated[str, typer.Option(help="Numbers of images of one kind, with commas; the sheets tell them.")],
    out: Annotated[Path, typer.Option(help="Sheet to write (.png), and a .json with the numbers beside it.")],
    count: Annotated[int, typer.Option(min=1, help="Images on the sheet.")] = 100,
    seed: SeedOption = 0,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show the images that are most like some examples, to mark more images of a kind for train --kind."""
    from .. import guidance
    from .minority_alike import find_alike as likeness_of
    from .minority_alike import numbered_sheet
    from .minority_setup import inputs_of

    examples = integers("--images", images)
    if out.suffix != ".png":
        raise ValueError(f"--out {str(out)!r} must end in .png")
    _, settings = guidance.read_scores(scores)
    inputs = inputs_of(settings, offline=offline)
    with progress_bar() as bar:
        likeness = likeness_of(inputs, examples, seed, bar)
    likeness[list(examples)] = -2.0  # they are known
    found = likeness.topk(min(count, len(likeness) - len(set(examples)))).indices.tolist()
    out.parent.mkdir(parents=True, exist_ok=True)
    numbered_sheet(inputs, found, out)
    record = {
        "examples": list(examples),
        "alike": [{"image": i, "likeness": likeness[i].item()} for i in found],
        "out": str(out),
    }
    _write(out.with_suffix(".json"), record)
    if as_json:
        typer.echo(json.dumps(record))
        return
    out_console.print(f"look at {out}: train --kind with the numbers of those that are of the kind, and of the examples")


@app.command()
def train(
    scores: Annotated[Path, typer.Option(help="scores.safetensors of fewstep minority score.")],
    out: Annotated[Path, typer.Option(help="Classifier file to write (.safetensors); an interrupted training continues.")],
    bins: Annotated[int | None, typer.Option(min=2, help="Classes of equal counts; 10 by default.")] = None,
    parts: Annotated[
        int | None,
        typer.Option(min=1, help="Kinds into which the rarest class is split, 6 by default; 1 is the published method."),
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(help="Instead of bins: numbers of images of one kind, with commas (see alike); once for every kind."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1)] = 2000,
    train_batch: Annotated[int, typer.Option(min=1, help="Images per training step.")] = 256,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    patience: Annotated[int, typer.Option(min=0, help="Looks without improvement before stopping; 0 never.")] = 0,
    flip: Annotated[bool, typer.Option(help="Mirror images at random.")] = False,
    balanced: Annotated[
        bool, typer.Option("--balanced", help="Show every class equally often while training; --kind always does.")
    ] = False,
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
    from .minority_report import kinds_figure
    from .minority_setup import read_whitening, setup_of

    marked = [integers("--kind", text) for text in kind or []]
    if marked and (bins is not None or parts is not None):
        raise ValueError("--kind takes the place of --bins and --parts: give either")
    bins, parts = (2, len(marked)) if marked else (bins or 10, parts or 6)
    values, settings = guidance.read_scores(scores)
    tensors = read_whitening(scores.parent) if settings.get("whitened") else {}
    setup = setup_of(settings, tensors, device=device, dtype=dtype, batch_size=256, offline=offline)
    inputs, classes = setup.inputs, setup.classes
    if marked:
        labels = guidance.marked_kinds(len(values), marked)
    else:
        labels = guidance.equal_count_bins(values, bins) if classes is None else guidance.bins_within(values, classes, bins)
    classifier = guidance.MinorityClassifier(
        inputs[[0]].shape[1:], bins, parts=parts, classes=None if classes is None else int(classes.max()) + 1,
        network=network, width=width, depth=depth, seed=seed,
    ).to(device)  # fmt: skip
    fit_settings = guidance.FitSettings(
        steps=steps, batch_size=train_batch, lr=lr, patience=patience or None, flip=flip,
        balanced=balanced or bool(marked), seed=seed,
    )  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet, kinds = out.with_name(out.stem + "-kinds.png"), []
    with progress_bar() as bar:
        if marked:
            kinds = kinds_figure(inputs, values, labels, bins, sheet)
        elif parts > 1:
            rows = (labels == bins - 1).nonzero().flatten().split(256)
            task = bar.add_task("splitting the rarest class", total=len(rows))
            residuals = [setup.residuals(part, device, seed + i) for i, part in enumerate(bar.track(rows, task_id=task))]
            labels = guidance.split_rarest(labels, torch.cat(residuals), parts, seed=seed)
            kinds = kinds_figure(inputs, values, labels, bins, sheet)
        task = bar.add_task("training", total=steps)
        checkpoint = out.with_name(out.name + ".checkpoint")
        report = guidance.fit(
            classifier, inputs, labels, setup.scorer.noise_schedule, fit_settings, class_labels=classes,
            checkpoint=checkpoint,
            progress=lambda step, loss: bar.update(task, completed=step, description=f"training, loss {loss:.3f}"),
        )  # fmt: skip
        if kinds:
            bar.add_task("measuring the kinds", total=None)
            shares = guidance.kind_shares(classifier, inputs, class_labels=classes, seed=seed, device=device).tolist()
            kinds = [{**kind, "share": share} for kind, share in zip(kinds, shares, strict=True)]
    classifier.facts = {"scores": settings, "fit": {**vars(report)}, "kinds": kinds}
    classifier.facts["rarest_parts"] = (labels >= bins - 1).sum().item()
    classifier.tensors = tensors
    classifier.save(out)
    checkpoint.unlink(missing_ok=True)
    record = {"out": str(out), "bins": bins, "parts": parts, "kinds": kinds, **vars(report)}
    if as_json:
        typer.echo(json.dumps(record))
        return
    held = "" if report.validation_loss is None else f"; held-out loss {report.validation_loss:.3f} nats"
    out_console.print(f"{out}: {report.steps} steps, weights of step {report.best_step}{held}")
    if kinds:
        out_console.print(f"look at {sheet}: sample --label part:0,3 goes towards the kinds you choose, --label each to all")


@app.command()
def sample(
    classifier: Annotated[Path, typer.Option(help="Classifier file of fewstep minority train.")],
    nfe: Annotated[int, typer.Option(min=1, help="Network evaluations per image.")],
    out: Annotated[Path, typer.Option(help="Folder for images and report; an interrupted run in it is completed.")],
    sampler: Annotated[str, typer.Option(help="Recipe text, path of a JSON schedule, or a shipped name.")] = "ddpm",
    num: Annotated[int, typer.Option(min=1, help="Images, guided and as many unguided.")] = 100,
    scale: Annotated[float, typer.Option(help="Scale of the guidance towards the bin.")] = 4.0,
    label: Annotated[str, typer.Option(help=LABEL_HELP)] = "-1",
    window: Annotated[str, typer.Option(help="low,high in alpha_bar: where guidance acts.")] = "0,1",
    class_labels: ClassLabelsOption = None,
    guidance: Annotated[float | None, typer.Option(help="Scale of the pipeline's own classifier-free guidance.")] = None,
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
    from .minority_compare import compare_sets
    from .minority_report import write_report
    from .minority_sampling import SampleRequest, sample_sets
    from .minority_setup import setup_of

    low, _, high = window.partition(",")
    try:
        bounds, chosen = (float(low), float(high)), label if not label.lstrip("-").isdecimal() else int(label)
    except ValueError:
        raise ValueError(f"--window {window!r}: expected low,high in alpha_bar") from None
    found = MinorityClassifier.load(classifier)
    settings = found.facts.get("scores")
    if settings is None:
        raise ValueError(f"{classifier} does not say which model and data it belongs to; train it with fewstep minority train")
    labels = integers("--class-labels", class_labels)
    request = SampleRequest(sampler, nfe, num, scale, chosen, bounds, labels, guidance, rejection, batch_size, seed)
    setup = setup_of(settings, found.tensors, device=device, dtype=dtype, batch_size=batch_size, offline=offline)
    if len(setup.inputs) < 100:
        raise ValueError(
            f"the report compares with the rare tenth of at least 100 images; {settings['data']} has {len(setup.inputs)}"
        )
    with progress_bar() as bar:
        drawn = sample_sets(setup, found, request, settings, out, bar)
        result = compare_sets(setup, found, drawn, out, reference=reference, protocol=protocol, seed=seed, bar=bar)
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


def _write(path: Path, record: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(path)

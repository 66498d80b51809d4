"""``fewstep fid``: quality of samplers at fixed numbers of network evaluations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import (
    INCOMPLETE,
    BatchSizeOption,
    ClassLabelsOption,
    DeviceOption,
    DtypeOption,
    GuidanceOption,
    HeightOption,
    JsonOption,
    OfflineOption,
    PromptOption,
    PromptsOption,
    SeedOption,
    WidthOption,
    conditioning,
    err_console,
    integers,
    progress_bar,
)

if TYPE_CHECKING:
    from ..evaluation import FeatureExtractor, FixedNfeRun, Reference

app = typer.Typer(help=__doc__.split(": ", 1)[1], no_args_is_help=True)

ProtocolOption = Annotated[
    str, typer.Option(help="Features: fd-randconv64-v1, fd-pixel, fid-tf, fid-ptfid, fid-clean, fd-dinov2, clip.")
]
WeightsOption = Annotated[Path | None, typer.Option(help="File or folder of the features' weights.")]
UnverifiedOption = Annotated[
    bool, typer.Option("--unverified-weights", help="Use other Inception weights; the result is not called FID.")
]
HeldOutOption = Annotated[str | None, typer.Option(help="Real images that are not in the reference, for the floor.")]
DeclaredOption = Annotated[
    str | None, typer.Option(help="Protocol that an npz with mu and sigma was made with, if it does not say.")
]
OutArgument = Annotated[Path, typer.Argument(help="Folder of fewstep fid run.")]


@app.command()
def run(
    sampler: Annotated[
        list[str], typer.Option(help="Recipe text, JSON path, shipped name or diffusers:ClassName[:option=value,...]; repeat.")
    ],
    nfe: Annotated[str, typer.Option(help="Comma-separated numbers of network evaluations per image.")],
    ref: Annotated[
        str,
        typer.Option(help="Real images (folder, zip, npz, digits, torchvision:..., datasets:...) or npz of moments."),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the run; an interrupted or shorter run in it is continued.")],
    model: Annotated[list[str], typer.Option(help="Reference pipeline, diffusers folder or hub id; repeat.")] = ["digits"],  # noqa: B006
    num: Annotated[int, typer.Option(min=2, help="Images per sampler, NFE and repetition.")] = 5000,
    repeats: Annotated[int, typer.Option(min=1, help="Repetitions with other seeds, for the standard deviation.")] = 1,
    protocol: ProtocolOption = "fd-randconv64-v1",
    metrics: Annotated[
        str, typer.Option(help="Comma-separated: frechet, kernel, prdc, infinity, cmmd, sw2, energy, clip-score.")
    ] = "frechet,kernel",
    held_out: HeldOutOption = None,
    ref_protocol: DeclaredOption = None,
    weights: WeightsOption = None,
    unverified_weights: UnverifiedOption = False,
    clip_weights: Annotated[Path | None, typer.Option(help="CLIP model folder for clip-score.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder of reference features; OUT/references by default.")] = None,
    shard: Annotated[int, typer.Option(min=1, help="Images per file: what a killed process can lose.")] = 500,
    save_images: Annotated[bool, typer.Option("--save-images", help="Also write every image as PNG.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would cost, and stop.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Sample everything again.")] = False,
    prompt: PromptOption = None,
    prompts: PromptsOption = None,
    class_labels: ClassLabelsOption = None,
    guidance: GuidanceOption = None,
    height: HeightOption = None,
    width: WidthOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    batch_size: BatchSizeOption = 100,
    seed: SeedOption = 0,
    offline: OfflineOption = False,
) -> None:
    """Sample with every sampler at every NFE, and write results, tables, a plot and a report.

    Several processes share the work of one folder: torchrun --nproc_per_node 8 -m -- fewstep fid run ..., accelerate launch
    -m -- fewstep fid run ..., srun, or a Slurm array. Each may be killed and started again; what is there is not made twice.
    """
    from ..evaluation import FixedNfeRun, Model, load_extractor, load_pipeline
    from ..evaluation.fixed_nfe import Worker

    worker = Worker.from_environment()
    where = worker.device(device)
    what = conditioning(prompt, prompts, class_labels, guidance, height, width)
    wanted = [name.strip() for name in metrics.split(",") if name.strip()]
    numbers = integers("--nfe", nfe)
    extractor = load_extractor(protocol, weights=weights, device=where, offline=offline, unverified=unverified_weights)
    models = [Model(name, load_pipeline(name, device=where, dtype=dtype, offline=offline), dtype) for name in model]
    clip = None
    if "clip-score" in wanted:
        from ..evaluation.features.transformer import ClipScore

        clip = ClipScore(clip_weights, device=where, offline=offline)
    reference = _reference(ref, extractor, held_out, cache or out / "references", batch_size, ref_protocol)
    job = FixedNfeRun(
        out, models, sampler, numbers, extractor, reference, num=num, repeats=repeats, seed=seed, conditioning=what,
        metrics=wanted, batch_size=batch_size, shard_size=shard, clip=clip, worker=worker,
    )  # fmt: skip
    if dry_run:
        _cost(job)
        return
    if fresh:
        job.clear()
    _sample(job, save_images)
    job.score(again=fresh)
    _finish(job)


def _reference(
    ref: str, extractor: FeatureExtractor, held_out: str | None, cache: Path, batch_size: int, declared: str | None
) -> Reference:
    from ..evaluation import reference_features

    with progress_bar() as bar:
        task = bar.add_task("reference", total=None)
        return reference_features(
            ref, extractor, held_out=held_out, cache=cache, batch_size=batch_size, declared=declared,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip


def _sample(job: FixedNfeRun, save_images: bool) -> None:
    """The worker's share, with a bar over all images of the run."""
    total = len(job.cells) * job.num * job.repeats
    with progress_bar() as bar:
        task = bar.add_task("images", total=total, completed=total - sum(len(seeds) for _, seeds in job.missing()))

        def advance(what: str, images: int) -> None:
            bar.update(task, description=what, advance=images)

        job.sample(advance, _image_writer(job) if save_images else None)


def _image_writer(job: FixedNfeRun) -> Any:
    from ..evaluation import save_image

    def write(cell: Any, seed: int, pixels: Any) -> None:
        folder = job.out / "images" / f"{cell.digest[:8]}-nfe{cell.nfe}"
        folder.mkdir(parents=True, exist_ok=True)
        save_image(pixels.float() / 255, folder / f"{seed:06d}.png")

    return write


def _finish(job: FixedNfeRun) -> None:
    """Write the files when everything is there; say what is missing when it is not."""
    from ..evaluation.fixed_nfe import read_results, write_figures, write_report, write_tables

    missing = job.missing()
    if missing:
        images = sum(len(seeds) for _, seeds in missing)
        if job.worker.world > 1:
            err_console.print(f"process {job.worker.rank} is done; the others have {images} images to go")
            return
        err_console.print(f"{images} images are missing; run the same command again")
        raise typer.Exit(INCOMPLETE)
    records = read_results(job.out)
    write_tables(job.out, records)
    write_figures(job.out, records)
    path = write_report(job.out, records)
    typer.echo((job.out / "table.md").read_text(), nl=False)
    err_console.print(f"report: {path}")


def _cost(job: FixedNfeRun) -> None:
    from ..evaluation.fixed_nfe import estimate

    rows = list(estimate(job))
    for row in rows:
        typer.echo(
            f"{row['model']}, {row['sampler']} at {row['nfe']}: {row['images']} images, {row['forwards']} network passes, "
            f"about {row['seconds']:.0f} s, {row['bytes'] / 1e6:.1f} MB"
        )
    seconds, size = (sum(row[key] for row in rows) for key in ("seconds", "bytes"))
    per = f", {seconds / job.worker.world:.0f} s on {job.worker.world} processes" if job.worker.world > 1 else ""
    typer.echo(f"in all: {sum(r['forwards'] for r in rows)} network passes, about {seconds:.0f} s{per}, {size / 1e6:.1f} MB")


@app.command()
def table(
    out: OutArgument,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Print the table of a run, and write table.md and table.csv again."""
    from ..evaluation.fixed_nfe import read_results, write_tables

    records = read_results(out)
    write_tables(out, records)
    if as_json:
        typer.echo(json.dumps(records))
    else:
        typer.echo((out / ("table.csv" if as_csv else "table.md")).read_text(), nl=False)


@app.command()
def plot(out: OutArgument) -> None:
    """Draw the figures and the report of a run again."""
    from ..evaluation.fixed_nfe import read_results, write_figures, write_report

    records = read_results(out)
    for path in [*write_figures(out, records), write_report(out, records)]:
        typer.echo(str(path))


@app.command()
def diff(
    first: OutArgument,
    second: Annotated[Path, typer.Argument(help="Folder of another run with the same protocol, reference and number.")],
    as_json: JsonOption = False,
) -> None:
    """Compare the cells that two runs have in common; refused when they were not made in the same way."""
    from ..evaluation.fixed_nfe import diff as difference
    from ..evaluation.fixed_nfe import read_results

    rows = difference(read_results(first), read_results(second))
    if as_json:
        typer.echo(json.dumps(rows))
        return
    typer.echo(
        "| model | sampler | NFE | metric | first | second | difference |\n| --- | --- | ---: | --- | ---: | ---: | ---: |"
    )
    for row in rows:
        error = "" if row["error"] is None else f" ± {row['error']:.1g}"
        cells = [row["model"], row["sampler"], str(row["nfe"]), row["metric"], f"{row['first']:.4g}", f"{row['second']:.4g}"]
        typer.echo("| " + " | ".join([*cells, f"{row['difference']:+.2g}{error}"]) + " |")
    if not all(row["same_seeds"] for row in rows):
        err_console.print("the runs have different seeds: differences hold their noise")


@app.command()
def ref(
    source: Annotated[str, typer.Argument(help="Real images, or an npz with mu and sigma that does not name its protocol.")],
    out: Annotated[Path, typer.Option(help="The npz file to write.")],
    protocol: ProtocolOption = "fd-randconv64-v1",
    held_out: HeldOutOption = None,
    ref_protocol: DeclaredOption = None,
    weights: WeightsOption = None,
    unverified_weights: UnverifiedOption = False,
    device: DeviceOption = "cpu",
    batch_size: BatchSizeOption = 100,
    offline: OfflineOption = False,
) -> None:
    """Make the reference of a set of real images: mu, sigma, features, and the id of what made them."""
    from ..evaluation import load_extractor, reference_features

    if out.suffix != ".npz":
        raise ValueError(f"--out {out}: a reference is an .npz file")
    extractor = load_extractor(protocol, weights=weights, device=device, offline=offline, unverified=unverified_weights)
    with progress_bar() as bar:
        task = bar.add_task("reference", total=None)
        reference = reference_features(
            source, extractor, held_out=held_out, batch_size=batch_size, declared=ref_protocol,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    reference.save(out)
    typer.echo(f"{out}: {reference.moments.n or 'unknown'} images, {reference.moments.dim} features, {reference.protocol}")

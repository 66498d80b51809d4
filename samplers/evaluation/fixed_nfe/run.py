"""A whole run: plan, sample what is missing, score what is complete."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..features import FeatureExtractor
from ..floors import Floor, frechet_floor
from ..models import Conditioning
from ..references import Reference
from .plan import SHARD, Cell, Model, canonical_hash, plan_cells, shards_of
from .report import SHOWN
from .results import Record, append, locked, read_results
from .sampling import make_shard
from .scoring import check_metrics, score, summary
from .shards import ShardFolder
from .workers import Worker

if TYPE_CHECKING:
    from ..features.transformer import ClipScore

PACKAGES = ("fewstep", "torch", "diffusers")


@dataclass(frozen=True)
class FixedNfeRun:
    """Models x samplers x NFE, each with the same seeds.

    Everything is checked when the object is made. `sample` and `score` may then run in any number of processes that see
    the same folder, be interrupted, and be run again: a shard that is there is never made twice.

    Attributes:
        out: folder of the run.
        models: loaded.
        samplers: recipe texts, paths or names of schedules, "diffusers:ClassName[:option=value,...]".
        nfes: numbers of evaluations.
        extractor: of the features.
        reference: real features of the same protocol.
        num: images per repetition.
        repeats: repetitions, each with the seeds after those of the one before; they give the standard deviation.
        seed: of the first image.
        conditioning: what to generate.
        metrics: keys of `METRICS`.
        batch_size: images per pipeline call; changes nothing but speed and memory.
        shard_size: images per file; what a killed process can lose.
        clip: for the metric clip-score.
        worker: this process's share.
        cells: what was planned.

    Raises:
        ValueError: anything that cannot run.
    """

    out: Path
    models: Sequence[Model]
    samplers: Sequence[str]
    nfes: Sequence[int]
    extractor: FeatureExtractor
    reference: Reference
    num: int = 5000
    repeats: int = 1
    seed: int = 0
    conditioning: Conditioning = field(default_factory=Conditioning)
    metrics: Sequence[str] = ("frechet", "kernel")
    batch_size: int = 100
    shard_size: int = SHARD
    clip: ClipScore | None = None
    worker: Worker = field(default_factory=Worker)
    cells: Sequence[Cell] = field(init=False)

    def __post_init__(self) -> None:
        """Check and plan."""
        object.__setattr__(self, "out", Path(self.out))
        if self.num < 2 or self.repeats < 1 or self.shard_size < 1 or self.batch_size < 1 or self.seed < 0:
            raise ValueError(
                f"num {self.num} (at least 2), repeats {self.repeats}, shard size {self.shard_size}, batch size "
                f"{self.batch_size} (at least 1) or seed {self.seed} (at least 0) is too small"
            )
        if self.reference.protocol != self.extractor.protocol.id:
            raise ValueError(f"the reference was made with {self.reference.protocol}, not with {self.extractor.protocol.id}")
        check_metrics(self.metrics, self.reference, prompts=bool(self.conditioning.prompts) and self.clip is not None)
        planned = plan_cells(self.models, self.samplers, self.nfes, self.conditioning, self.extractor.protocol.id)
        object.__setattr__(self, "cells", planned)

    def shards(self, repeat: int | None = None) -> list[range]:
        """Seeds of the shards, of one repetition or of all."""
        repeats = range(self.repeats) if repeat is None else (repeat,)
        starts = [self.seed + r * self.num for r in repeats]
        return [shard for start in starts for shard in shards_of(start, start + self.num, self.shard_size)]

    def folder(self, cell: Cell) -> ShardFolder:
        """Where the shards of a cell are."""
        return ShardFolder(self.out / "shards", cell.digest)

    def missing(self) -> list[tuple[Cell, range]]:
        """What is still to be sampled by anyone."""
        return [(cell, seeds) for cell in self.cells for seeds in self.folder(cell).missing(self.shards())]

    def clear(self) -> None:
        """Delete the shards of this run, so that `sample` makes them again.

        Raises:
            ValueError: there are other processes, whose shards would go with them.
        """
        if self.worker.world > 1:
            raise ValueError(f"{self.worker.world} processes cannot begin afresh together; delete {self.out / 'shards'} first")
        for cell in self.cells:
            for seeds in self.shards():
                self.folder(cell).file(seeds).unlink(missing_ok=True)

    def sample(
        self,
        progress: Callable[[str, int], None] = lambda what, images: None,
        save_image: Callable[[Cell, int, Tensor], None] | None = None,
    ) -> None:
        """Make this process's missing shards.

        Args:
            progress: called with what is sampled and the images just made.
            save_image: called with cell, seed and pixels of each image.
        """
        work = [(cell, seeds) for cell in self.cells for seeds in self.shards()]
        models = {model.name: model for model in self.models}
        # The share is of all shards, not of the missing ones, which other processes may see differently.
        for index in self.worker.share(list(range(len(work)))):
            cell, seeds = work[index]
            if self.folder(cell).file(seeds).is_file():
                continue
            shard = make_shard(
                models[cell.model],
                cell,
                self.conditioning,
                self.extractor,
                seeds,
                batch_size=self.batch_size,
                keep_images=SHOWN if seeds.start == self.seed else 0,
                clip=self.clip if "clip-score" in self.metrics else None,
                progress=lambda images, cell=cell: progress(f"{cell.sampler} at {cell.nfe}", images),
                save_image=(lambda seed, image, cell=cell: save_image(cell, seed, image)) if save_image else None,
            )
            self.folder(cell).write(seeds, shard)

    def score(self, *, again: bool = False) -> list[Record]:
        """Score complete cells that have no record yet, and give the records of this run.

        Args:
            again: also score those that have one; the new record counts.
        """
        side = self.reference.frechet(self.extractor.protocol)
        floor: Floor | None = None
        for cell in self.cells:
            if self.folder(cell).missing(self.shards()) or (not again and self._key(cell) in self._known()):
                continue
            floor = floor or frechet_floor(
                self.reference, self.extractor.protocol, self.num, generator=torch.Generator().manual_seed(0)
            )
            repeats = [
                score(self.folder(cell), self.shards(r), self.metrics, self.reference, side, self.extractor.protocol)
                for r in range(self.repeats)
            ]
            append(self.out, self._record(cell, repeats, floor), again=again)
        known = self._known()
        return [known[key] for key in map(self._key, self.cells) if key in known]

    def _known(self) -> dict[str, Record]:
        if not (self.out / "results.jsonl").is_file():
            return {}
        with locked(self.out):
            return {record["key"]: record for record in read_results(self.out)}

    def _key(self, cell: Cell) -> str:
        parts = [cell.digest, self.reference.id, self.num, self.repeats, self.seed, sorted(self.metrics)]
        return canonical_hash(parts)[:24]

    def _record(self, cell: Cell, repeats: list[dict[str, float]], floor: Floor | None) -> Record:
        mean, std = summary(repeats)
        cost = self._cost(cell)
        protocol, starts = self.extractor.protocol, [self.seed + r * self.num for r in range(self.repeats)]
        first = self.shards(0)[0]
        return {
            "key": self._key(cell),
            "cell": cell.digest,
            "model": cell.model,
            "weights": cell.settings["weights"],
            "dtype": cell.settings["dtype"],
            "sampler": cell.sampler,
            "schedule_sha256": canonical_hash(cell.settings["schedule"]),
            "nfe": cell.nfe,
            "nfe_counted": cost.pop("nfe"),
            "passes": cost.pop("passes"),
            "conditioning": cell.settings["conditioning"],
            "conditioning_id": canonical_hash(cell.settings["conditioning"]),
            "protocol": protocol.id,
            "title": protocol.title,
            "unit_variance": protocol.unit_variance,
            "reference": {"name": self.reference.name, "id": self.reference.id, "n": self.reference.moments.n},
            "n": self.num,
            "repeats": self.repeats,
            "seeds": [[start, start + self.num] for start in starts],
            "first_shard": [first.start, first.stop],
            "values": repeats,
            "mean": mean,
            "std": std,
            "floor": asdict(floor) if floor else None,
            "seconds": cost,
            "versions": _versions(),
            "machine": {"system": platform.system(), "processor": platform.machine(), "threads": torch.get_num_threads()},
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }

    def _cost(self, cell: Cell) -> dict[str, float]:
        nfe, passes, sampling, features, cpu = set(), set(), 0.0, 0.0, 0.0
        for seeds in self.shards():
            shard = self.folder(cell).read(seeds)
            nfe.add(shard.nfe)
            passes.add(shard.passes)
            sampling, features, cpu = (
                sampling + shard.sampling_seconds,
                features + shard.feature_seconds,
                cpu + shard.cpu_seconds,
            )
        if len(nfe) != 1 or len(passes) != 1:
            raise ValueError(f"the shards of {cell.sampler} at {cell.nfe} disagree on the evaluations per image: {sorted(nfe)}")
        return {"nfe": nfe.pop(), "passes": passes.pop(), "sampling": sampling, "features": features, "cpu": cpu}


def estimate(run: FixedNfeRun, images: int = 8) -> Iterator[dict[str, Any]]:
    """What a run will cost: the forwards of each cell that are missing, its time from a small sample, its disk space.

    Args:
        run: the run; nothing is written.
        images: of the small sample, made once for each model and sampler at its smallest NFE.
    """
    models = {model.name: model for model in run.models}
    todo: dict[Cell, int] = {cell: 0 for cell in run.cells}
    for cell, seeds in run.missing():
        todo[cell] += len(seeds)
    for model in models.values():
        for sampler in run.samplers:
            cells = sorted((c for c in run.cells if (c.model, c.sampler) == (model.name, sampler)), key=lambda c: c.nfe)
            probe = range(run.seed, run.seed + min(images, run.batch_size))
            shard = make_shard(model, cells[0], run.conditioning, run.extractor, probe, batch_size=len(probe))
            for cell in cells:
                forwards = shard.passes * cell.nfe * todo[cell]
                seconds = shard.sampling_seconds / len(probe) * cell.nfe / cells[0].nfe * todo[cell]
                size = shard.features.shape[1] * 4 * todo[cell]
                yield {"model": model.name, "sampler": sampler, "nfe": cell.nfe, "images": todo[cell],
                       "forwards": int(forwards), "seconds": seconds, "bytes": size}  # fmt: skip


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions

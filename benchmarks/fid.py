"""What evaluation costs: Frechet distances next to torchmetrics, memory, and sampling while features are made.

    python benchmarks/fid.py                the tables, also written to benchmarks/results/fid.md
    python benchmarks/fid.py --check        exit code 1 when a target is missed
    python benchmarks/fid.py --repeats 1    quicker

Times are CPU seconds of one thread, medians over repeats in which both contestants take turns. Features are random with a
spectrum as that of Inception's; the reference is already there on both sides (torchmetrics with reset_real_features=False).
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from samplers.evaluation import Conditioning, FeatureMoments, FrechetReference, Model, load_extractor, load_pipeline
from samplers.evaluation.fixed_nfe.plan import plan_cells
from samplers.evaluation.fixed_nfe.sampling import make_shard

RESULT = Path(__file__).parent / "results" / "fid.md"
DIM = 2048
TARGETS = {5000: 2.5, 1000: 10.0}


def features(n: int, seed: int) -> Tensor:
    """(n, 2048) float32 with a power-law spectrum."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, DIM, generator=generator) * torch.arange(1, DIM + 1).pow(-0.5)


def seconds(work: Callable[[], float]) -> tuple[float, float]:
    start = time.process_time()
    value = work()
    return time.process_time() - start, value


def frechet(repeats: int) -> tuple[list[str], bool]:
    """Generated features in, distance out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchmetrics.image.fid import FrechetInceptionDistance
    identity = torch.nn.Identity()
    identity.num_features = DIM
    metric = FrechetInceptionDistance(feature=identity, reset_real_features=False)
    real = features(5000, 0)
    for part in real.split(250):
        metric.update(part, real=True)
    side = FrechetReference.from_features(real)
    lines = [
        "| images | batch | torchmetrics, s | fewstep, s | ratio | difference |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    met = True
    for n, batch in ((5000, 250), (5000, 64), (1000, 250)):
        fake = features(n, 1) * 1.05
        ours, theirs, ratios, values = [], [], [], (0.0, 0.0)

        def reference(fake: Tensor = fake, batch: int = batch) -> float:
            metric.reset()
            for part in fake.split(batch):
                metric.update(part, real=False)
            return float(metric.compute())

        def own(fake: Tensor = fake, batch: int = batch) -> float:
            if len(fake) < DIM:
                return side.distance_to_features(torch.cat(list(fake.split(batch))))
            moments = FeatureMoments(DIM)
            for part in fake.split(batch):
                moments.update(part)
            return side.distance_to_moments(moments)

        for _ in range(repeats):
            a, first = seconds(reference)
            b, second = seconds(own)
            theirs.append(a)
            ours.append(b)
            ratios.append(a / b)
            values = first, second
        ratio = statistics.median(ratios)
        met &= ratio >= TARGETS[n]
        difference = abs(values[0] - values[1]) / values[1]
        times = f"{statistics.median(theirs):.2f} | {statistics.median(ours):.2f}"
        lines.append(f"| {n} | {batch} | {times} | {ratio:.1f} | {difference:.0e} |")
    return lines, met


def memory() -> tuple[list[str], bool]:
    """Peak memory after 4k and after 24k images."""
    moments, peaks = FeatureMoments(DIM), []
    for images in (4000, 20_000):
        for seed in range(images // 500):
            moments.update(features(500, seed))
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    growth = peaks[1] - peaks[0]
    return [f"Streaming moments: peak memory grows by {growth:.1f} MB from 4 000 to {moments.n} images."], growth < 16


class Heavy:
    """The shipped features, repeated: as slow as sampling."""

    def __init__(self, times: int) -> None:
        self.extractor, self.times = load_extractor(), times
        self.protocol = self.extractor.protocol

    def __call__(self, images: Tensor) -> Tensor:
        big = images.repeat_interleave(4, -1).repeat_interleave(4, -2)
        for _ in range(self.times - 1):
            self.extractor(big)
        return self.extractor(images)


def overlap() -> list[str]:
    """Wall time of sampling with features beside it, on as many cores as there are."""
    model = Model("digits", load_pipeline("digits"))
    lines = ["| features | sampling alone, s | features alone, s | together, s |", "| --- | ---: | ---: | ---: |"]
    for name, extractor in (("shipped", load_extractor()), ("a quarter of sampling", Heavy(2))):
        cell = plan_cells([model], ["dpmpp"], [8], Conditioning(), extractor.protocol.id)[0]
        shards, walls = [], []
        for _ in range(3):
            start = time.perf_counter()
            shards.append(make_shard(model, cell, Conditioning(), extractor, range(300), batch_size=50))
            walls.append(time.perf_counter() - start)
        best = min(range(3), key=walls.__getitem__)
        alone = []
        pixels = torch.randint(0, 256, (50, 1, 8, 8), dtype=torch.uint8)
        for _ in range(3):
            start = time.perf_counter()
            for _ in range(6):
                extractor(pixels)
            alone.append(time.perf_counter() - start)
        sampling = []
        for _ in range(3):
            start = time.perf_counter()
            make_shard(model, cell, Conditioning(), Free(extractor), range(300), batch_size=50)
            sampling.append(time.perf_counter() - start)
        lines.append(f"| {name} | {min(sampling):.2f} | {min(alone):.2f} | {walls[best]:.2f} |")
    return lines


class Free:
    """Features that cost nothing."""

    def __init__(self, extractor: Heavy) -> None:
        self.protocol = extractor.protocol

    def __call__(self, images: Tensor) -> Tensor:
        return torch.zeros(len(images), 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    flat, constant = memory()
    table, fast = frechet(arguments.repeats)
    beside = overlap()
    text = "\n".join([
        "# Cost of evaluation", "", f"`python benchmarks/fid.py --repeats {arguments.repeats}`, torch {torch.__version__}.", "",
        f"Frechet distance of {DIM} features, CPU seconds of one thread:", "", *table, "", *flat, "",
        f"300 images at 8 evaluations, wall seconds on {os.cpu_count()} cores, best of three:", "", *beside, "",
    ])  # fmt: skip
    print(text)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(text)
    return 1 if arguments.check and not (fast and constant) else 0


if __name__ == "__main__":
    sys.exit(main())

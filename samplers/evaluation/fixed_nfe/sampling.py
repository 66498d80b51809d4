"""Making shards: the next batch is sampled while a thread extracts the features of the one before."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..features import FeatureExtractor, quantise
from ..models import Conditioning, generate, use_sampler
from .counting import record_calls
from .plan import Cell, Model, nominal_nfe
from .shards import Shard

if TYPE_CHECKING:
    from ..features.transformer import ClipScore

AHEAD = 8  # batches that may wait for their features before sampling waits


def make_shard(
    model: Model,
    cell: Cell,
    conditioning: Conditioning,
    extractor: FeatureExtractor,
    seeds: range,
    *,
    batch_size: int,
    keep_images: int = 0,
    clip: ClipScore | None = None,
    progress: Callable[[int], None] = lambda images: None,
    save_image: Callable[[int, Tensor], None] | None = None,
) -> Shard:
    """Sample the images of these seeds and extract their features.

    Image number s depends on seed s alone: not on the batch, the shard or the process.

    Args:
        model: loaded.
        cell: of this model.
        conditioning: what to generate; image s takes entry s of prompts and classes.
        extractor: of the features.
        seeds: one image each.
        batch_size: images per pipeline call.
        keep_images: of this many first images the pixels are kept.
        clip: also score the images against their prompts.
        progress: called with the images of each batch.
        save_image: called with the seed and the pixels (C, H, W) uint8 of each image.

    Raises:
        ValueError: images that hold no numbers, or a number of evaluations that changes between batches.
    """
    batches = [seeds[i : i + batch_size] for i in range(0, len(seeds), batch_size)]
    features: list[Future[tuple[Tensor, Tensor, float]]] = []
    waiting: deque[Future[tuple[Tensor, Tensor, float]]] = deque()
    kept: list[Tensor] = []
    counts = set()
    cpu = time.process_time()
    sampling = 0.0
    with use_sampler(model.pipe, cell.sampler) as scheduler, ThreadPoolExecutor(1, "features") as thread:
        for batch in batches:
            began = time.perf_counter()
            with record_calls(model.pipe) as calls:
                images = generate(model.pipe, conditioning, batch, steps=cell.nfe, seed=0)
            sampling += time.perf_counter() - began
            counts.add(calls.count(len(batch), nominal_nfe(scheduler, cell.nfe)))
            if not bool(images.isfinite().all()):
                raise ValueError(f"{cell.sampler} at {cell.nfe} evaluations diverged: its images are not finite")
            pixels = quantise(images)
            kept.append(pixels[: max(0, keep_images - (batch.start - seeds.start))])
            prompts = [conditioning.prompts[i % len(conditioning.prompts)] for i in batch] if clip else []
            future = thread.submit(_features, extractor, pixels, clip, prompts)
            features.append(future)
            waiting.append(future)
            for seed, image in zip(batch, pixels, strict=True) if save_image else ():
                save_image(seed, image)
            while len(waiting) > AHEAD:
                waiting.popleft().result()
            while waiting and waiting[0].done():
                waiting.popleft().result()
            progress(len(batch))
        results = [future.result() for future in features]
    if len(counts) != 1:
        raise ValueError(f"{cell.sampler}: the evaluations per image changed between batches: {sorted(counts)}")
    nfe, passes = counts.pop()
    return Shard(
        features=torch.cat([result[0] for result in results]),
        images=torch.cat(kept),
        clip_scores=torch.cat([result[1] for result in results]),
        nfe=nfe,
        passes=passes,
        sampling_seconds=sampling,
        feature_seconds=sum(result[2] for result in results),
        cpu_seconds=time.process_time() - cpu,
    )


def _features(
    extractor: FeatureExtractor, pixels: Tensor, clip: ClipScore | None, prompts: list[str]
) -> tuple[Tensor, Tensor, float]:
    began = time.perf_counter()
    stream = torch.cuda.Stream() if torch.cuda.is_available() else None
    with torch.cuda.stream(stream):  # none is a no-op
        features = extractor(pixels).float().cpu()
        scores = clip(pixels, prompts).cpu() if clip else torch.empty(0)
    if not bool(features.isfinite().all()):
        raise ValueError("features are not finite")
    return features, scores, time.perf_counter() - began

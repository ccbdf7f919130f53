"""Dry run: estimates the memory, time and disk space of a training from a few real steps. It writes nothing."""

import itertools
import shutil
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from metaformer.assembly.description import describe
from metaformer.assembly.preparation import Preparation
from metaformer.config import TrainConfig
from metaformer.errors import UserError
from metaformer.interfaces import Batch
from metaformer.tracking.console import duration
from metaformer.training.memory import fits, largest_that_fits
from metaformer.training.step import train_step

STEPS = 3  # the first step warms up and is not measured


@dataclass(frozen=True)
class _Measured:
    images_per_second: float
    waiting: float  # share of the time, on the rank that waited longest
    memory_gib: float  # on the GPU that needs most; 0 on a CPU


def dry_run(prepared: Preparation, searches: bool | None = None) -> dict[str, Any]:
    """Take a few real training steps, and print and return estimates for the whole run.

    It is an error if a step does not fit in memory.

    Args:
        searches: Whether to search for the largest batch that fits in memory; None searches on GPUs.
    """
    runtime = prepared.runtime
    searches = runtime.device.type == "cuda" if searches is None else searches
    network = prepared.distribute()
    # Not watched: compiling, and a search for the largest batch, may take long.
    with runtime.pause_watchdog(), closing(prepared.feed()) as feed:
        batches = itertools.chain.from_iterable(feed.epoch(epoch) for epoch in itertools.count())
        first = next(batches)
        largest = _largest(prepared, first) if searches else None
        measured = _measure(prepared, network, itertools.chain([first], batches))
    result = _result(prepared, measured, largest)
    if runtime.is_main:
        print(*_lines(prepared, measured, result), sep="\n", flush=True)
    return result


def _largest(prepared: Preparation, batch: Batch) -> int:
    """Return the most images in a forward pass that fit on every rank; raise an error if the configured ones do not."""
    config, runtime = prepared.config, prepared.runtime
    learner = prepared.learner(prepared.state.model)  # without DDP: each rank for itself
    learner.train_mode()
    size = config.rank_batch_size(runtime.world_size)
    limit = len(prepared.splits.train) // runtime.world_size
    found = largest_that_fits(lambda images: fits(learner, batch, images), size, config.batch_multiple, limit)
    largest = min(runtime.gather_objects(found))
    if largest < size:
        share = config.global_batch_size // runtime.world_size
        fitting = [n for n in config.accumulations(runtime.world_size) if share <= n * largest]
        fix = f"use accumulation_steps={fitting[0]}" if fitting and largest else "use a smaller image_size or network"
        raise UserError(
            f"global_batch_size={config.global_batch_size}: {size} images per rank and forward pass do not fit in "
            f"memory, {largest} do; {fix}"
        )
    return largest


def _measure(prepared: Preparation, network: nn.Module, batches: Iterator[Batch]) -> _Measured:
    runtime, state = prepared.runtime, prepared.state
    learner = prepared.learner(network)
    learner.train_mode()
    began, waited = 0.0, [0.0]

    def counted() -> Iterator[Batch]:
        for batch in batches:
            waited[0] += batch.waited.total
            yield batch

    source = counted()
    for step in range(STEPS):
        if step == 1:
            learner.stopwatch.read()  # waits for the device
            began, waited[0] = time.perf_counter(), 0.0
        train_step(learner, source, measure_norm=True)
        state.progress.count_step(prepared.config.global_batch_size)
    float(state.loss_sum)  # waits for the device
    seconds = time.perf_counter() - began
    ranks = runtime.gather_objects((seconds, waited[0], runtime.peak_memory_gib()))
    slowest = max(seconds for seconds, _, _ in ranks)
    return _Measured(
        (STEPS - 1) * prepared.config.global_batch_size / slowest,
        max(waited for _, waited, _ in ranks) / slowest,
        max(memory for _, _, memory in ranks),
    )


def _result(prepared: Preparation, measured: _Measured, largest: int | None) -> dict[str, Any]:
    config, ranks = prepared.config, prepared.runtime.world_size
    steps = config.last_step(prepared.plan.steps_per_epoch)
    seconds = steps * config.global_batch_size / measured.images_per_second
    return {
        "dry_run": True,
        "model": config.model.name,
        "largest_batch_per_rank": largest,
        "memory_gib": measured.memory_gib,
        "images_per_second": measured.images_per_second,
        "data_wait": measured.waiting,
        "steps": steps,
        "seconds": seconds,
        "rank_hours": seconds * ranks / 3600,
        "checkpoints": _kept_checkpoints(config),
        "checkpoint_bytes": prepared.state.size(),
        "free_bytes": shutil.disk_usage(_existing(config.resolved_run_dir)).free,
    }


def _lines(prepared: Preparation, measured: _Measured, result: dict[str, Any]) -> Iterator[str]:
    config, runtime, plan = prepared.config, prepared.runtime, prepared.plan
    yield from describe(config, prepared.images, runtime, prepared.splits, prepared.state, plan.steps_per_epoch)
    yield from [*prepared.lines, *prepared.notes]
    on_gpu, largest = runtime.device.type == "cuda", result["largest_batch_per_rank"]
    memory = f", at most {measured.memory_gib:.1f} GiB on a GPU" if on_gpu else ""
    yield f"dry run      {STEPS} steps taken{memory}; nothing is written"
    if largest is not None:
        batch = largest * runtime.world_size * config.accumulation
        yield f"memory       {largest:,} images per rank and forward pass fit: global_batch_size={batch}"
    yield (
        f"speed        {measured.images_per_second:,.0f} images/s, {100 * measured.waiting:.0f} % waiting for data, "
        f"in the last {STEPS - 1} steps"
    )
    kind = "GPU" if on_gpu else "process"
    yield (
        f"time         {duration(result['seconds'])} for {result['steps']:,} steps, {result['rank_hours']:,.1f} {kind} "
        "hours, without validations"
    )
    count, each, free = result["checkpoints"], result["checkpoint_bytes"] / 2**20, result["free_bytes"] / 2**20
    verdict = "" if count * each <= free else ", which is not enough"
    yield f"disk         {count} checkpoints of {each:,.0f} MiB: {count * each:,.0f} of {free:,.0f} MiB free{verdict}"


def _kept_checkpoints(config: TrainConfig) -> int:
    """Return the maximum number of checkpoints on disk: those kept, the best, and one that is being written."""
    every = config.checkpoint.keep_every_epochs
    return config.checkpoint.keep + 2 + (config.total_epochs // every if every else 0)


def _existing(folder: Path) -> Path:
    """Return the folder, or its nearest parent that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.is_dir())

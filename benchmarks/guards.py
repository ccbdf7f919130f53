"""Measure how much checkpoints and guards slow down training: seconds per checkpoint, microseconds per step and guard.

  python -m benchmarks.guards --model poolformer_m48 --image-size 64 --batch 8
  torchrun --nproc_per_node=2 -m benchmarks.guards --model poolformer_s12 --image-size 128 --batch 32

The steps are those of the training loop, with an average of the weights (EMA), on random images.

Checkpoints: the same number of steps is timed in alternation with and without a save that starts at the first step.
The difference is the cost of a save: the copy to host memory, and the writing while training continues.

Guards: each is timed alone; the fastest of many runs counts. Prints a table, then JSON.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks.harness import console
from benchmarks.learner import make_learner, random_batches
from metaformer import runtime
from metaformer.models import create_model, load_weights, save_state
from metaformer.program import run_program
from metaformer.runtime import Runtime
from metaformer.training.checkpoint import CheckpointFolder, WeightFiles
from metaformer.training.config import CheckpointConfig, PrecisionName
from metaformer.training.interruption import Interruption
from metaformer.training.replicas import check_replicas
from metaformer.training.saver import CheckpointSaver
from metaformer.training.state import TrainState
from metaformer.training.step import train_step
from metaformer.training.stragglers import Stopwatch
from metaformer.training.watchdog import Watchdog

SAVE_EVERY, COMPARE_EVERY = 500, 1000  # steps, over which the cost of what is not done at each is spread


def main() -> None:
    """Measure on all ranks, and report on rank 0."""
    arguments = _parse()
    with runtime.start() as ranks, tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        model = create_model(arguments.model)
        model = model.to(ranks.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = random_batches(arguments.batch, arguments.image_size, ranks.device)
        network = ranks.distribute(model, next(images).images)
        learner = make_learner(model, ranks, arguments.precision, network, ema=True)

        def step() -> None:
            train_step(learner, images)
            learner.state.progress.step += 1

        for _ in range(2):
            step()
        plain = min(seconds(step, ranks) for _ in range(arguments.steps))
        costs = guard_costs(learner.state, ranks, 1e6 * plain)
        checkpoint = checkpoint_cost(learner.state, step, ranks, Path(folder), arguments) if arguments.repeats else {}
        if ranks.is_main:
            _report(arguments, ranks, plain, costs, checkpoint)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="poolformer_s12")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32, help="images per rank")
    parser.add_argument("--precision", choices=[name.value for name in PrecisionName], default="fp32")
    parser.add_argument("--steps", type=int, default=8, help="steps in each measurement")
    parser.add_argument("--repeats", type=int, default=3, help="saves to measure; 0: none")
    parser.add_argument("--folder", type=Path, help="folder for checkpoints; default: /tmp")
    return parser.parse_args()


def seconds(work: Callable[[], object], ranks: Runtime) -> float:
    """Return the seconds that a function takes, including its work on the device."""
    _wait(ranks)
    started = time.perf_counter()
    work()
    _wait(ranks)
    return time.perf_counter() - started


def _wait(ranks: Runtime) -> None:
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()


def guard_costs(state: TrainState, ranks: Runtime, step_us: float) -> dict[str, float]:
    """Return the microseconds per step of each guard."""
    loss = torch.zeros((), dtype=torch.float64, device=ranks.device)
    interruption, stopwatch = Interruption(ranks), Stopwatch(ranks.device)
    watchdog = Watchdog(ranks.rank, 600)

    def guarded() -> None:
        state.scaler.step(state.optimizer)
        state.count(loss, state.scaler.skipped(state.optimizer))
        state.scaler.update()

    def watch() -> None:
        stopwatch.start()
        stopwatch.stop()
        watchdog.beat()

    guarded()
    difference = _least(guarded, ranks, 10) - _least(state.optimizer.step, ranks, 10)
    with watchdog.watching():
        costs = {
            "skipping steps that are not finite": difference,
            "agreeing on signals": _least(interruption.agreed, ranks, 200),
            "watchdog and stopwatch": _least(watch, ranks, 200),
            f"comparing ranks, every {COMPARE_EVERY} steps": (
                _least(lambda: check_replicas(state.model, ranks, 0), ranks, 5) / COMPARE_EVERY
            ),
        }
    interruption.finish_vote()
    return {name: 1e6 * cost for name, cost in costs.items()} | {"a step": step_us}


def _least(work: Callable[[], object], ranks: Runtime, times: int) -> float:
    return min(seconds(work, ranks) for _ in range(times))


def checkpoint_cost(
    state: TrainState, step: Callable[[], None], ranks: Runtime, folder: Path, arguments: argparse.Namespace
) -> dict[str, float]:
    """Return the seconds by which a save delays training, and their parts; rank 0 saves while all ranks train."""
    weight_files = WeightFiles(partial(save_state, network=arguments.model), load_weights)
    config = CheckpointConfig(keep=1)
    checkpoints = CheckpointFolder(folder / "checkpoints", config, {"model": arguments.model}, weight_files)
    saver = CheckpointSaver(checkpoints, config, print)
    plain, saving, blocked = [], [], []
    for repeat in range(arguments.repeats):
        plain.append(sum(seconds(step, ranks) for _ in range(arguments.steps)))
        started = time.perf_counter()
        if ranks.is_main:
            saver.save(state, f"step-{repeat}", is_best=False)
        blocked.append(time.perf_counter() - started)
        for _ in range(arguments.steps):
            step()
        _wait(ranks)
        saving.append(time.perf_counter() - started)
        saver.wait()
    written = time.perf_counter()
    if ranks.is_main:
        saver.save(state, "step-999", is_best=False)
    saver.wait()
    alone = time.perf_counter() - written
    saver.close()
    return {
        "copying to host memory": statistics.median(blocked),
        "copying and writing, without training": alone,
        "taken from training": statistics.median(saving) - statistics.median(plain),
    }


def _report(
    arguments: argparse.Namespace, ranks: Runtime, plain: float, costs: dict[str, float], checkpoint: dict[str, float]
) -> None:
    shape = f"{arguments.model}, {arguments.image_size} px, {ranks.world_size} x {arguments.batch} images"
    table = Table("what", "cost", "of a step", title=f"{shape}, {arguments.precision}: {1000 * plain:.0f} ms a step")
    for name, cost in costs.items():
        if name != "a step":
            table.add_row(name, f"{cost:.0f} us a step", f"{1e-4 * cost / plain:.3f} %")
    together = sum(cost for name, cost in costs.items() if name != "a step")
    table.add_row("guards together", f"{together:.0f} us a step", f"{1e-4 * together / plain:.3f} %", end_section=True)
    for name, cost in checkpoint.items():
        share = f"{100 * cost / SAVE_EVERY / plain:.3f} % every {SAVE_EVERY}"
        table.add_row(f"a checkpoint: {name}", f"{cost:.2f} s", share)
    console().print(table)
    figures: dict[str, Any] = {"step_seconds": plain, "guards_us": costs, "checkpoint_seconds": checkpoint}
    print(json.dumps(vars(arguments) | {"folder": None, "ranks": ranks.world_size} | figures))


if __name__ == "__main__":
    run_program(main)

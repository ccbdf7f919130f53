"""Runs train.py with a PoolFormer that trains in milliseconds, and with injected faults.

The environment variable FAULTS lists the faults as RANK:STEP:FAULT, separated by spaces; steps count from 1. The faults
are real: signals that a rank sends to itself, values that are not finite, changed bits. No part of the program is
replaced by a simpler one.
"""

from metaformer.death_signal import end_with_launcher
from metaformer.program import run_program

if __name__ == "__main__":
    end_with_launcher()  # as in train.py

import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

import metaformer.assembly  # noqa: F401 - train.py imports it late, and the faults patch its modules
import train
from metaformer.data.load.worker_loader import WorkerLoader
from metaformer.interfaces import Batch
from metaformer.models.metaformer import Architecture
from metaformer.models.variants import POOLING, VARIANTS
from metaformer.training.checkpoint import CheckpointFolder
from metaformer.training.loop import Trainer
from metaformer.training.state import Snapshot
from metaformer.training.step import Learner, train_step

SMALL = Architecture((1, 1, 1, 1), (8, 16, 24, 32), POOLING, drop_path_rate=0.1)


def main() -> None:
    """Train with the faults in FAULTS."""
    torch.set_num_threads(1)
    VARIANTS["poolformer_s12"] = SMALL
    rank = int(os.environ.get("RANK", 0))
    faults = [fault.split(":", 2) for fault in os.environ.get("FAULTS", "").split()]
    planned = {int(step): name for fault_rank, step, name in faults if int(fault_rank) == rank}
    _inject_in_steps(planned)
    _inject_in_start(planned.get(0, ""))
    _inject_in_data(planned)
    _inject_in_validation(planned)
    _inject_in_saves(planned)
    _inject_in_tracking(planned.get(0, ""))
    if planned.get(0) == "term-in-start":
        vars(sys.modules["metaformer.assembly.training"])["describe"] = _stop_start
    if planned.get(0) == "other-seed":
        sys.argv.append("seed=7")
    if planned.get(0) == "other-code":
        vars(sys.modules["metaformer.assembly.preparation"])["code_fingerprint"] = lambda: "another"
    run_program(train.main, must_print=False)


def _inject_in_steps(planned: dict[int, str]) -> None:
    def step(learner: Learner, batches: Iterator[Batch], measure_norm: bool) -> Any:
        state = learner.state
        number = state.progress.step + 1
        fault = planned.get(number, planned.get(0, ""))
        match fault:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "kill-once" if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
                os.kill(os.getpid(), signal.SIGKILL)
            case "term" | "usr1" | "int" | "hup" | "stop":  # once the data has arrived
                batches = map(partial(_signal, getattr(signal, f"SIG{fault.upper()}")), batches)
            case "hang":
                time.sleep(1000)
            case "slow":
                time.sleep(0.1)
            case "wait":  # until the test lets the run go on
                while not Path(os.environ["GO"]).exists():
                    time.sleep(0.02)
            case "slow-forward":
                handle = state.model.get_submodule("stem").register_forward_hook(_delay)
            case "nan":
                batches = map(_poison, batches)
            case "term-in-backward":
                state.model.get_parameter("stem.conv.bias").register_hook(_terminate)
        result = train_step(learner, batches, measure_norm)
        if fault == "slow-forward":
            handle.remove()
        if fault == "perturb":
            with torch.no_grad():
                state.model.get_parameter("stages.2.blocks.0.mlp.fc1.weight")[3, 1] += 1e-6
        return result

    vars(sys.modules["metaformer.training.loop"])["train_step"] = step


def _inject_in_start(fault: str) -> None:
    if fault == "stop-before-joining":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault == "stop-in-start":
        assembly = vars(sys.modules["metaformer.assembly.preparation"])
        make = assembly["make_model"]

        def make_model(*arguments: Any) -> Any:
            os.kill(os.getpid(), signal.SIGSTOP)
            return make(*arguments)

        assembly["make_model"] = make_model


def _inject_in_data(planned: dict[int, str]) -> None:
    read = WorkerLoader.epoch

    def epoch(self: WorkerLoader, epoch: int, first: int = 0) -> Iterator[torch.Tensor]:
        for number, images in enumerate(read(self, epoch, first), start=1):
            if planned.get(number) == "no-data":
                time.sleep(1000)
            yield images

    WorkerLoader.epoch = epoch  # type: ignore[method-assign]


def _inject_in_validation(planned: dict[int, str]) -> None:
    original = Trainer._stops_validation
    calls = 0

    def stop(self: Trainer) -> bool:
        nonlocal calls
        calls += 1
        if planned.get(self.state.progress.step) == "term-in-validation" and calls == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    Trainer._stops_validation = stop  # type: ignore[method-assign]


def _inject_in_saves(planned: dict[int, str]) -> None:
    write = CheckpointFolder._write

    def write_with_fault(self: CheckpointFolder, snapshot: Snapshot, folder: Path) -> None:
        fault = planned.get(snapshot.progress["step"])
        if fault == "term-in-save":
            os.kill(os.getpid(), signal.SIGTERM)
        write(self, snapshot, folder)
        if fault == "kill-in-save":
            os.kill(os.getpid(), signal.SIGKILL)

    CheckpointFolder._write = write_with_fault  # type: ignore[method-assign]


def _inject_in_tracking(fault: str) -> None:
    if fault.startswith("tracker-"):
        program = Path(__file__).with_name("tracker_program.py")
        vars(sys.modules["metaformer.tracking.make"])["WANDB_PROCESS"] = [sys.executable, str(program), fault]


def _poison(batch: Batch) -> Batch:
    batch.images.fill_(math.nan)
    return batch


def _signal(number: signal.Signals, batch: Batch) -> Batch:
    os.kill(os.getpid(), number)
    return batch


def _delay(*arguments: Any) -> None:
    time.sleep(0.3)


def _stop_start(*arguments: Any) -> Iterator[str]:
    for _ in range(3):  # SLURM and torchrun may each send it
        os.kill(os.getpid(), signal.SIGTERM)
    yield "never"


def _terminate(gradient: torch.Tensor) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def run_as(rank: int, world_size: int, port: int, argv: list[str], environment: dict[str, str], log: Path) -> None:
    """Run one rank in this process, with torchrun's variables and output to LOG.out and LOG.err."""
    counts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    counts["MASTER_PORT"] = port
    variables = {name: str(count) for name, count in counts.items()}
    os.environ.update(variables | {"MASTER_ADDR": "127.0.0.1"} | environment)
    for descriptor, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(f"{log}{suffix}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.argv = ["train.py", *argv]
    main()


if __name__ == "__main__":
    main()

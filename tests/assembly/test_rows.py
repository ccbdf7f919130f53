"""Test that rows and checkpoints stay consistent: each row exists once, however and whenever a run is interrupted."""

import csv
import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from metaformer.assembly import run as assembly_run
from metaformer.assembly.run import Run, open_tracker
from metaformer.composing import compose_training
from metaformer.config import TrainConfig
from metaformer.errors import Interrupted
from metaformer.interfaces import Row, Tracker
from metaformer.signals import STOP_SIGNALS
from metaformer.tracking import run_folder
from metaformer.tracking.tracker import NullTracker
from metaformer.training.config import CheckpointConfig
from metaformer.training.manifest import read_manifest
from metaformer.training.saver import CheckpointSaver
from metaformer.training.state import TrainState
from metaformer.training.watchdog import Watchdog
from tests.training.conftest import checkpoint_folder, tiny_network, tiny_state
from tests.training.test_loop import CPU, Numbers, trainer

KILL, TERM = "kill", "term"
NO_FAULT = (0, "")
Fault = tuple[int, str]  # the event of a start at which it strikes, counted from 1, and the kind


class Killed(BaseException):
    """Stands in for the death of the process."""


@dataclass
class Events:
    """Records a run's events and injects the fault at one of them."""

    fault: Fault
    names: list[str] = field(default_factory=list)

    def record(self, name: str) -> None:
        """Record an event, and inject the fault if it is due."""
        self.names.append(name)
        if len(self.names) == self.fault[0]:
            if self.fault[1] == KILL:
                raise Killed
            os.kill(os.getpid(), signal.SIGTERM)


class RecordingTracker(NullTracker):
    """Records an event before each row of a tracker."""

    def __init__(self, tracker: Tracker, events: Events) -> None:
        self._tracker, self._events = tracker, events

    def metrics(self, row: Row) -> None:
        self._events.record(row["kind"])
        self._tracker.metrics(row)


@pytest.fixture(autouse=True)
def fast_starts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restore signal handlers, and make starts take milliseconds by leaving out processes and large configurations."""
    monkeypatch.setattr(run_folder, "describe_environment", dict)
    monkeypatch.setattr(assembly_run, "redacted", lambda config: OmegaConf.create({}))
    monkeypatch.setattr(Watchdog, "watching", lambda self: nullcontext())
    monkeypatch.setattr(Watchdog, "beat", lambda self: None)
    monkeypatch.setattr("sys.argv", ["train.py"])
    former = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for number, handler in former.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    """Return the configuration of a run that may restart 100 times without progress."""
    return compose_training(["tracking=local", "report.enabled=false", "guards.max_starts_without_progress=100"])


def start(config: TrainConfig, run_dir: Path, fault: Fault, settings: dict[str, Any]) -> list[str]:
    """Train the tiny network in a run folder as train.py does, and return the events up to its end or the fault.

    Events are saves, rows and validations. Nothing changes on disk between two events.
    """
    events = Events(fault)
    run_dir.mkdir(exist_ok=True)
    state, checkpoints = tiny_state(tiny_network(nn.Tanh), ema=False), checkpoint_folder(run_dir / "checkpoints")
    found = checkpoints.find().folder
    if found is not None:
        checkpoints.load(state, found)
    loop = trainer(state, run_dir, Numbers(8), **settings)
    saver = CheckpointSaver(checkpoints, CheckpointConfig(background=False), print)
    save = saver.save

    def recorded_save(state: TrainState, name: str, is_best: bool) -> None:
        events.record("save")
        save(state, name, is_best)

    def validate(model: nn.Module, stop: Callable[[], bool]) -> dict[str, Any]:
        events.record("validate")
        if stop():
            raise Interrupted("")
        return {"top1": 10.0 * state.progress.step, "top5": 100.0, "loss": 1.0, "images": 2}

    saver.save = recorded_save  # type: ignore[method-assign]
    loop.saver, loop.validate = saver, validate
    try:
        limits = {name: getattr(loop.config, name) for name in ("epochs", "schedule", "max_steps", "checkpoint")}
        run = Run(replace(config, run_dir=str(run_dir), **limits), 1, loop.steps_per_epoch, state, "", loop.goodput)
        with open_tracker(run, CPU) as tracker:
            loop.tracker = RecordingTracker(tracker, events)
            loop.run()
    except (Killed, Interrupted):
        pass
    saver.close()
    return events.names


def rows(run_dir: Path) -> list[Row]:
    """Return the rows of metrics.jsonl."""
    file = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def contents(run_dir: Path) -> str:
    """Return what the next start finds: the rows, and the progress of the checkpoint that it resumes from."""
    checkpoint = run_dir / "checkpoints" / "last"
    progress = read_manifest(checkpoint)["progress"] if checkpoint.exists() else None
    return json.dumps([[(row["kind"], row["step"]) for row in rows(run_dir)], progress])


def check(run_dir: Path, settings: dict[str, Any]) -> None:
    """Assert that each step, each validation and the end has one row, in order, and that summary.csv agrees."""
    epoch = settings["steps_per_epoch"]
    steps = settings.get("max_steps", settings["epochs"] * epoch)
    expected: list[tuple[str, int]] = []
    for step in range(1, steps + 1):
        expected += [("train", step)] + [("validation", step)] * (step % epoch == 0)
    found = rows(run_dir)
    assert [(row["kind"], row["step"]) for row in found] == [*expected, ("final", steps)]
    assert found[-1]["top1"] == 10.0 * steps
    validated = [step for kind, step in expected if kind == "validation"]
    if validated:
        with (run_dir / "summary.csv").open(newline="") as file:
            assert [int(line["step"]) for line in csv.DictReader(file)] == validated


@pytest.mark.parametrize(
    "settings",
    [
        {"epochs": 2, "steps_per_epoch": 1},
        {"epochs": 1, "steps_per_epoch": 2, "checkpoint": CheckpointConfig(every_steps=1)},
        {"epochs": 1, "steps_per_epoch": 2, "max_steps": 1},
        {"epochs": 2, "steps_per_epoch": 2, "max_steps": 2},
    ],
    ids=["epochs", "checkpoints within an epoch", "max_steps", "max_steps at an epoch's end"],
)
def test_each_row_once(config: TrainConfig, tmp_path: Path, settings: dict[str, Any]) -> None:
    """All sequences of kills before rows, saves and validations, and of SIGTERM in steps and validations, are tried.

    From each state of the run folder that they leave, the same command produces the same rows.
    """
    reached: dict[str, Path] = {"": tmp_path / "new"}
    pending = [tmp_path / "new"]
    names = (tmp_path / str(number) for number in itertools.count())

    def begin(before: Path, fault: Fault) -> tuple[Path, list[str]]:
        run_dir = next(names)
        if before.exists():
            shutil.copytree(before, run_dir, symlinks=True)
        return run_dir, start(config, run_dir, fault, settings)

    while pending:
        before = pending.pop()
        whole, events = begin(before, NO_FAULT)
        check(whole, settings)
        faults = [(number, KILL) for number in range(1, len(events) + 1)]
        faults += [(number, TERM) for number, name in enumerate(events, 1) if name in ("train", "validate")]
        for fault in faults:
            after, _ = begin(before, fault)
            if contents(after) not in reached:
                reached[contents(after)] = after
                pending.append(after)
    assert len(reached) >= 5, "the faults must leave different contents"

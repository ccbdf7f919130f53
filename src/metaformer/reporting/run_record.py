"""Reads the record of a run from its run folder; a damaged or missing file affects only its own part."""

import fcntl
import json
import math
import os
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from omegaconf import OmegaConf

from metaformer.errors import UserError, printable
from metaformer.reporting import class_results
from metaformer.reporting.class_results import ClassAccuracy, Confusion
from metaformer.reporting.examples import Examples, read_examples
from metaformer.reporting.outcomes import READ_ERRORS, Settings, flatten

T = TypeVar("T")

KINDS = ("train", "validation", "final")
# First words of the lines of log.txt about the course of a run; the log pads them to 13 characters.
EVENTS = ("resuming", "trained", "ALARM", "warning")
_LOG_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) ((\w+)\s+.*)")


class Change(NamedTuple):
    """A field that a resume changed."""

    step: int
    time: str
    name: str
    before: Any
    now: Any


class Event(NamedTuple):
    """A line of the log about the run as a whole."""

    time: str
    text: str


@dataclass
class RunRecord:
    """The record of a run.

    Attributes:
        rows: rows of metrics.jsonl that have `kind`, `epoch`, `step` and `samples`.
        settings: config.yaml by dotted names; empty if unknown.
        status: status.json.
        environment: environment.json.
        overrides: the overrides on the command line.
        problems: a line for each file, or part of a file, that could not be read.
        classes: accuracy by class in the last validation, worst first, of the better of weights and EMA.
        confusion: the classes that were confused.
        examples: the images that were predicted worst and best.
    """

    folder: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    settings: Settings = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    classes: list[ClassAccuracy] = field(default_factory=list)
    confusion: Confusion | None = None
    examples: Examples | None = None

    @property
    def name(self) -> str:
        """Return the run folder's name."""
        return printable(self.folder.absolute().name)

    @property
    def train_rows(self) -> list[dict[str, Any]]:
        """Return the log rows."""
        return [row for row in self.rows if row["kind"] == "train"]

    @property
    def validations(self) -> list[dict[str, Any]]:
        """Return the validations, with that of a run that stopped within an epoch."""
        found = [row for row in self.rows if row["kind"] == "validation"]
        last = found[-1]["step"] if found else -1
        return found + [row for row in self.rows if row["kind"] == "final" and row["step"] > last]

    @property
    def ema_is_better(self) -> bool:
        """Return whether the EMA has a higher top-1 than the weights in the last validation."""
        last = self.validations[-1] if self.validations else {}
        weights, ema = last.get("top1"), last.get("ema_top1")
        return is_number(weights) and is_number(ema) and ema > weights  # type: ignore[operator]

    @property
    def examples_file(self) -> str:
        """Return the name, in the folder, of the list of the images predicted worst and best."""
        return f"validation/{'ema_' if self.ema_is_better else ''}images.json"

    @property
    def total_epochs(self) -> int | None:
        """Return the epochs that the run trains for, or None if unknown."""
        found = [self.settings.get(name) for name in ("epochs", "schedule.cooldown_epochs")]
        return sum(found) if all(map(_is_count, found)) else None  # type: ignore[arg-type]

    @property
    def samples_per_epoch(self) -> float | None:
        """Return the images of an epoch, or None before the first complete one."""
        found = [row for row in self.rows if row["kind"] == "validation" and row["epoch"] > 0]
        return found[-1]["samples"] / found[-1]["epoch"] or None if found else None

    @property
    def state(self) -> str:
        """Return the state in status.json, or "killed" if that says "running" and no process holds the run's lock."""
        state = self.status.get("state", "unknown")
        return "killed" if state == "running" and not _is_locked(self.folder / "lock") else str(state)

    @property
    def ranks(self) -> int | None:
        """Return the number of ranks of the last start."""
        derived = self.environment.get("derived")
        ranks = derived.get("ranks") if isinstance(derived, dict) else None
        return ranks if type(ranks) is int else None

    @property
    def resumed_steps(self) -> list[int]:
        """Return the steps at which the run resumed."""
        found = (re.search(r"^resuming .*, step (\d+)$", event.text) for event in self.events)
        return [int(line[1]) for line in found if line]

    @property
    def seconds(self) -> dict[str, float]:
        """Return the seconds by phase, over all starts."""
        seconds = self.status.get("seconds")
        found = seconds.items() if isinstance(seconds, dict) else ()
        return {str(name): float(value) for name, value in found if is_number(value) and value > 0}

    @property
    def device_hours(self) -> float | None:
        """Return the hours of all starts times the ranks of the last one."""
        return sum(self.seconds.values()) / 3600 * self.ranks if self.ranks and self.seconds else None


def is_number(value: Any) -> bool:
    """Return whether a value read from JSON is a finite number."""
    return (type(value) is float and math.isfinite(value)) or _is_count(abs(value) if type(value) is int else None)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def read_record(folder: Path) -> RunRecord:
    """Read the record of a run."""
    if not any((folder / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
        raise UserError(f"{folder}: not a run folder: it has neither config.yaml nor metrics.jsonl")
    record = RunRecord(folder)

    def read_file(name: str, parse: Callable[[Path], T], otherwise: T) -> T:
        """Parse a file; if that fails, note the reason."""
        file = folder / name
        try:
            return parse(file) if file.is_file() else otherwise
        except (*READ_ERRORS, *class_results.READ_ERRORS) as error:
            record.problems.append(f"{name}: {printable(str(error) or type(error).__name__, 200)}")
            return otherwise

    def read(name: str, parse: Callable[[str], T], otherwise: T) -> T:
        """Parse the text of a file."""
        return read_file(name, lambda file: parse(file.read_text(errors="replace")), otherwise)

    record.settings = read("config.yaml", _parse_settings, {})
    record.status = read("status.json", _parse_object, {})
    record.environment = read("environment.json", _parse_object, {})
    record.overrides = read("overrides.yaml", _parse_overrides, [])
    nothing: tuple[list[dict[str, Any]], int] = ([], 0)
    record.rows, broken = read("metrics.jsonl", _parse_rows, nothing)
    if broken:
        record.problems.append(f"metrics.jsonl: {broken} lines are damaged and left out")
    record.changes = read("changes.jsonl", _parse_changes, [])
    record.events = read("log.txt", _parse_events, [])
    prefix = "ema_" if record.ema_is_better else ""
    record.classes = read_file(f"{prefix}per_class.csv", class_results.read_per_class, [])
    record.confusion = read_file(f"validation/{prefix}confusion.npz", class_results.read_confusion, None)
    record.examples = read_file(record.examples_file, read_examples, None)
    return record


def _parse_settings(text: str) -> Settings:
    settings: Any = OmegaConf.to_container(OmegaConf.create(text))
    return flatten(settings)


def _parse_object(text: str) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return found


def _parse_overrides(text: str) -> list[str]:
    return [str(json.loads(line.removeprefix("- "))) for line in text.splitlines()]


def _parse_rows(text: str) -> tuple[list[dict[str, Any]], int]:
    """Return the rows that can be read, and the number of the others."""
    rows, broken = [], 0
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            broken += 1
            continue
        counts = (_is_count(row.get(name)) for name in ("epoch", "step", "samples")) if isinstance(row, dict) else ()
        if isinstance(row, dict) and row.get("kind") in KINDS and all(counts):
            rows.append(row)
        else:
            broken += 1
    return rows, broken


def _parse_changes(text: str) -> list[Change]:
    entries = [json.loads(line) for line in text.splitlines()]
    return [
        Change(int(entry["step"]), str(entry["time"]), name, before, now)
        for entry in entries
        for name, (before, now) in entry["changes"].items()
    ]


def _parse_events(text: str) -> list[Event]:
    found = (_LOG_LINE.fullmatch(line) for line in text.splitlines())
    return [Event(line[1], " ".join(line[2].split())) for line in found if line and line[3] in EVENTS]


def _is_locked(file: Path) -> bool:
    """Return whether a process holds the run's lock, a POSIX record lock (fcntl(2), F_GETLK), without taking it."""
    try:
        descriptor = os.open(file, os.O_RDWR)
    except OSError:
        return False
    try:
        flock = "hhqqi"  # l_type, l_whence, l_start, l_len, l_pid
        answer = fcntl.fcntl(descriptor, fcntl.F_GETLK, struct.pack(flock, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
        return bool(struct.unpack(flock, answer)[0] != fcntl.F_UNLCK)
    except OSError:  # the file system has no locks
        return False
    finally:
        os.close(descriptor)

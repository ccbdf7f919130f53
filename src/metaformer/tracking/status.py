"""RUN/status.json: the state of a run, for batch scripts, and a count of failed starts."""

import json
import time
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_origin

from metaformer.errors import UserError, one_line, warn
from metaformer.files import to_json, write_text_atomically
from metaformer.goodput import Goodput, TimeSpent
from metaformer.interfaces import Row
from metaformer.tracking.tracker import NullTracker

STATUS_FILE = "status.json"
SECONDS_BETWEEN_UPDATES = 10.0
RUNNING, DONE, INTERRUPTED, FAILED = "running", "done", "interrupted", "failed"


@dataclass
class Status:
    """The content of the status file.

    Attributes:
        state: "running", "done" (all requested steps), "interrupted" (stopped on request and saved) or "failed".
            "running" without a living process means that the process was killed.
        step: Number of optimizer steps when the file was written.
        reason: Why the run ended; may be empty.
        starts_without_progress: Number of consecutive earlier starts that began at the same step and crashed.
        started_at_step: Step at which this start began.
        fused: The fused parts that this start uses, or why it uses none.
        goodput: Percentage of the run's time, over all starts, spent in training.
        starts: Number of starts of the run.
        seconds: Seconds by phase, over all starts.
        unsaved: The part of `seconds` that no checkpoint contains, by phase.
        console: Why stdout or stderr can no longer be written; empty if both can.
    """

    state: str
    step: int
    reason: str
    starts_without_progress: int
    started_at_step: int
    fused: str = ""
    goodput: float = 0.0
    starts: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    unsaved: dict[str, float] = field(default_factory=dict)
    console: str = ""


class StatusFile(NullTracker):
    """Writes a run's status file at the start, periodically during the run, and at the end.

    Args:
        copy: A second file with the same content, for a batch script.
        goodput: Time counter of this process; the time of earlier starts is added to it.
    """

    def __init__(self, run_dir: Path, copy: Path | None, goodput: Goodput) -> None:
        self._file, self._copy, self._goodput = run_dir / STATUS_FILE, copy, goodput
        self._updated = 0.0
        self._status = Status(RUNNING, 0, "", 0, 0)

    def start(self, step: int, max_failed_starts: int, fused: str = "") -> None:
        """Record that this process starts at a step.

        It is an error if `max_failed_starts` consecutive starts at this step have crashed.
        """
        before = self._read()
        failed_starts = 0
        if before is not None and before.state in (RUNNING, FAILED) and before.started_at_step == step:
            failed_starts = before.starts_without_progress + 1
        if before is not None and failed_starts >= max_failed_starts:
            reason = " ".join(before.reason.split()) or "killed"
            raise UserError(
                f"{self._file}: {failed_starts} starts in a row have ended without a checkpoint after step {step} (the "
                f"last: {reason}); fix the cause, then remove this file to start again"
            )
        if before is not None:
            self._goodput.continue_from(TimeSpent(before.starts, before.seconds, before.unsaved))
        self._status = Status(RUNNING, step, "", failed_starts, step, fused)
        failures = self._write()
        if failures:
            raise UserError(failures[0])

    def metrics(self, row: Row) -> None:
        """Update the file; for train rows, at most every ten seconds. Disk errors are ignored."""
        if row["kind"] != "train" or time.monotonic() - self._updated > SECONDS_BETWEEN_UPDATES:
            self._updated = time.monotonic()
            self._status.step = row["step"]
            self._write()

    def console_failed(self, problem: str) -> None:
        """Record that stdout or stderr can no longer be written."""
        self._status.console = problem
        self._write()

    def end(self, state: str, step: int, reason: str) -> None:
        """Record the end of the run. If the file cannot be written, print only a warning."""
        self._status.state, self._status.step, self._status.reason = state, step, reason
        for failure in self._write():
            warn(failure)

    def _read(self) -> Status | None:
        try:
            content: dict[str, Any] = json.loads(self._file.read_text())
            if not isinstance(content, dict):
                raise ValueError("not an object")
            content.pop("time")
            status = Status(**content)
            for each in fields(status):
                value, expected = getattr(status, each.name), get_origin(each.type) or each.type
                items = value.values() if expected is dict and isinstance(value, dict) else ()
                if type(value) is not expected or any(type(item) is not float for item in items):
                    raise ValueError(f"{each.name} has the wrong type")
            return status
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            reason = one_line(error)
            raise UserError(f"{self._file}: damaged ({reason}); remove it to start again") from error

    def _write(self) -> list[str]:
        """Write both files, and return a line for each that cannot be written."""
        spent = self._goodput.spent()
        self._status.goodput = round(spent.goodput, 2)
        self._status.starts, self._status.seconds, self._status.unsaved = spent.starts, spent.seconds, spent.unsaved
        content = {**asdict(self._status), "time": datetime.now(UTC).isoformat(timespec="seconds")}
        failures = []
        for file in (self._copy, self._file):
            try:
                if file is not None:
                    write_text_atomically(file, to_json(content, indent=2) + "\n")
            except OSError as error:
                failures.append(f"{file}: cannot be written ({error.strerror or error})")
        return failures

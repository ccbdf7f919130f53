"""RUN/status.json: how a run stands, for batch scripts, and how often it has begun in vain."""

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
    """What the file says. `running` under which no process lives means that one was killed.

    Attributes:
        state: running; done: all steps that were asked for; interrupted: asked to stop, and saved; failed.
        step: optimizer steps when it was written.
        reason: why it ended; empty where there is nothing to say.
        starts_without_progress: starts in a row before this one that began at the same step and crashed.
        started_at_step: the step that this start began at.
        fused: which fused parts this start uses, or why it does not.
        goodput: percent of the run's time, over all starts, that was training.
        starts: of the run.
        seconds: where its time went, over all starts.
        unsaved: of these seconds, what no checkpoint holds.
        console: which of stdout and stderr cannot be written any more, and why; empty where both can.
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
    """Writes the status of one run: at its start, at times while it runs, at its end.

    Args:
        goodput: of this process; the starts before it are added.
        copy: a second file for the same, where a batch script wants to read it.
    """

    def __init__(self, run_dir: Path, copy: Path | None, goodput: Goodput) -> None:
        self._file, self._copy, self._goodput = run_dir / STATUS_FILE, copy, goodput
        self._updated = 0.0
        self._status = Status(RUNNING, 0, "", 0, 0)

    def start(self, step: int, most_in_vain: int, fused: str = "") -> None:
        """A process begins at a step.

        Raises:
            UserError: so many before it have begun there, and crashed, that there is no sense in another; or the file
                cannot be written.
        """
        before = self._read()
        in_vain = 0
        if before is not None and before.state in (RUNNING, FAILED) and before.started_at_step == step:
            in_vain = before.starts_without_progress + 1
        if before is not None and in_vain >= most_in_vain:
            reason = " ".join(before.reason.split()) or "killed"
            raise UserError(
                f"{self._file}: {in_vain} starts in a row have ended without a checkpoint after step {step} (the last: "
                f"{reason}); mend the cause, then remove this file to start again"
            )
        if before is not None:
            self._goodput.continue_from(TimeSpent(before.starts, before.seconds, before.unsaved))
        self._status = Status(RUNNING, step, "", in_vain, step, fused)
        failures = self._write()
        if failures:
            raise UserError(failures[0])

    def metrics(self, row: Row) -> None:
        """Bring the file up to date, unless it was a moment ago; a disk that refuses it is no reason to stop."""
        if row["kind"] != "train" or time.monotonic() - self._updated > SECONDS_BETWEEN_UPDATES:
            self._updated = time.monotonic()
            self._status.step = row["step"]
            self._write()

    def console_failed(self, what: str) -> None:
        """Training continues without stdout or stderr."""
        self._status.console = what
        self._write()

    def end(self, state: str, step: int, reason: str) -> None:
        """The run ends; a disk that refuses the file is no reason to end otherwise."""
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
            for known in fields(status):
                value, expected = getattr(status, known.name), get_origin(known.type) or known.type
                items = value.values() if expected is dict and isinstance(value, dict) else ()
                if type(value) is not expected or any(type(item) is not float for item in items):
                    raise ValueError(f"{known.name} is of another type")
            return status
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            reason = one_line(error)
            raise UserError(f"{self._file}: damaged ({reason}); remove it to start again") from error

    def _write(self) -> list[str]:
        """Returns a line for each file that cannot be written; the other one is, nevertheless."""
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

"""Writes a run's report in a separate process, so that it neither slows training down nor can make it fail."""

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from metaformer.errors import printable, warn
from metaformer.interfaces import Row
from metaformer.tracking.tracker import NullTracker

REPORT_PROCESS = (sys.executable, "-m", "metaformer.reporting.run_report")
LIMIT_SECONDS = 60.0  # limit for a report, which takes two seconds: a file system may hang
FAILED_SECONDS = 2.0  # limit for waiting at the end of a run that failed


class ReportTracker(NullTracker):
    """A tracker that starts a process to write RUN/report.html after each validation and at the end.

    A report that is due while the previous one is being written is skipped; the next one has its rows. Only the first
    failure is reported, as a warning.

    Args:
        command: Command to which the run folder is appended.
        limit_seconds: Time after which the process is killed.
    """

    def __init__(
        self, run_dir: Path, command: Sequence[str] = REPORT_PROCESS, limit_seconds: float = LIMIT_SECONDS
    ) -> None:
        self._command, self._limit_seconds = [*command, str(run_dir)], limit_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._end = 0.0
        self._warned = False

    def metrics(self, row: Row) -> None:
        """Start a report after a validation."""
        self._wait(0)
        if row["kind"] == "validation":
            self._start()

    def start_last(self, failed: bool) -> None:
        """Start the last report. Call it when the run's other files have their final content."""
        self._wait(FAILED_SECONDS / 2 if failed else self._limit_seconds)
        self._start()

    def close(self, failed: bool) -> None:
        """Wait for the last report; after a failure, wait only briefly."""
        self._wait(FAILED_SECONDS / 2 if failed else self._limit_seconds)
        if self._process is not None:  # its process ends with this one
            self._process.kill()
            self._process.communicate()

    def _start(self) -> None:
        if self._process is not None:
            return
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,  # so that Ctrl-C reaches only training
            )
            self._end = time.monotonic() + self._limit_seconds
        except OSError as error:
            self._warn(error.strerror or str(error))

    def _wait(self, seconds: float) -> None:
        """Wait for the process to end, for at most `seconds`; kill it if it has exceeded its time limit."""
        if self._process is None:
            return
        try:
            _, errors = self._process.communicate(timeout=min(seconds, max(0.0, self._end - time.monotonic())))
        except subprocess.TimeoutExpired:
            if time.monotonic() < self._end:
                return
            self._process.kill()
            self._process.communicate()
            errors = f"not written in {self._limit_seconds:g} s".encode()
        if self._process.returncode:
            lines = errors.decode(errors="replace").splitlines() or [f"exit code {self._process.returncode}"]
            self._warn(printable(lines[-1], 300))
        self._process = None

    def _warn(self, reason: str) -> None:
        if not self._warned:
            warn(f"report: {reason}; the run is unaffected; scripts/report.py writes it later")
            self._warned = True

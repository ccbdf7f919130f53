"""Runs a tracker in a separate process, so that a slow, stuck or broken tracker never blocks training."""

import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe, wait
from operator import methodcaller
from pathlib import Path
from typing import Any, NamedTuple

from metaformer.interfaces import Row
from metaformer.tracking.service import TEMPORARY_PREFIX, Delivered, Failed, Opened, Report, child_processes

# Seconds for closing after a failure or interruption: less than the other ranks wait for rank 0 to report the reason.
FAILED_CLOSE_SECONDS = 4.0
SILENT_SECONDS = 1.5  # seconds that `close` waits before it reports what it is waiting for


class _Call(NamedTuple):
    """A call to the tracker, which is kept until the end for a possible restart; a row takes 300 bytes."""

    kind: str  # "row", "file", or "" for calls that are not counted
    pickled: bytes


class BackgroundTracker:
    """A tracker that forwards all calls, in order, to a separate process, and never blocks the caller.

    If the process ends early, it is restarted once and receives all calls again.

    Args:
        name: Name of the tracker in messages.
        command: Command that starts the process; the number of a file descriptor is appended.
        open_arguments: Arguments for `ServedTracker.open`.
        open_seconds: Time after which a tracker that has not opened is reported, and no longer awaited at the end.
        close_seconds: Time without progress after which undelivered calls are dropped at the end of training.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        open_arguments: tuple[Any, ...],
        open_seconds: float,
        close_seconds: float,
    ) -> None:
        self._name, self._command, self._open_arguments = name, command, open_arguments
        self._open_seconds, self._close_seconds = open_seconds, close_seconds
        self._calls: list[_Call] = []
        self._new_calls = os.eventfd(0, os.EFD_CLOEXEC)  # wakes the thread
        self._changed = threading.Condition()  # protects all fields below
        self._delivered = 0
        self._opened = self._closing = self._given_up = self._ended = False
        self._first_opened: Opened | None = None
        self._last_opened: Opened | None = None
        self._started_at = self._progress_at = 0.0
        try:
            self._start()  # here, while no other thread starts processes
        except OSError as error:
            self._ended = True
            self._warn(f"cannot be started ({error.strerror or error}); training continues without it")
            return
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def metrics(self, row: Row) -> None:
        self._enqueue("row", methodcaller("metrics", row))

    def message(self, text: str) -> None:
        self._enqueue("", methodcaller("message", text))

    def progress(self, activity: str, done: int, total: int) -> None:
        """Do nothing, because progress is only shown in terminals."""

    def picture(self, name: str, file: Path) -> None:
        self._enqueue("file", methodcaller("picture", name, file))

    def checkpoint(self, folder: Path, aliases: list[str]) -> None:
        self._enqueue("file", methodcaller("checkpoint", folder, aliases))

    def close(self, failed: bool) -> None:
        """Wait until all calls are delivered or progress stops; after a failure, wait only briefly."""
        began, announced = time.monotonic(), failed
        with self._changed:
            self._enqueue("", methodcaller("close", failed))
            self._closing, self._progress_at = True, began
            while not self._ended and (now := time.monotonic()) < (end := self._close_deadline(began, failed)):
                if not announced and now >= began + SILENT_SECONDS:
                    limit = f"or for {end - now:.0f} s without progress"
                    self._print(f"waiting      until {self._name} has {self._undelivered()}, {limit}")
                    announced = True
                self._changed.wait((end if announced else min(end, began + SILENT_SECONDS)) - now)
            if not self._ended:
                self._given_up = True
                self._warn(f"{self._close_failure(failed)}; still missing: {self._undelivered()}; {self._advice()}")
                self._kill()
                shutil.rmtree(self._temporary, ignore_errors=True)

    def _close_deadline(self, began: float, failed: bool) -> float:
        if failed:
            return began + min(FAILED_CLOSE_SECONDS, self._close_seconds)
        deadline = self._progress_at + self._close_seconds
        return deadline if self._opened else min(deadline, self._started_at + self._open_seconds)

    def _close_failure(self, failed: bool) -> str:
        if not self._opened:
            return "has not opened"
        return "had no time to finish" if failed else f"no progress in {self._close_seconds:g} s"

    def _undelivered(self) -> str:
        kinds = Counter(call.kind for call in self._calls[self._delivered :])
        missing = [_count(kinds[kind], kind) for kind in ("row", "file") if kinds[kind]]
        return " and ".join(missing) or "the end of the run"

    def _advice(self) -> str:
        command = self._last_opened.upload_command if self._last_opened else ""
        return f"{f'`{command}` uploads what it has; ' if command else ''}the run folder has all rows"

    def _enqueue(self, kind: str, call: Any) -> None:
        with self._changed:
            if not self._ended:
                self._calls.append(_Call(kind, pickle.dumps(call)))
                os.eventfd_write(self._new_calls, 1)

    def _start(self) -> None:
        # wandb leaves temporary folders behind if it is killed, or ends without Python's clean-up as here.
        temporary = tempfile.mkdtemp(prefix=TEMPORARY_PREFIX)
        own_end, child_end = Pipe()
        with child_end:
            process = subprocess.Popen(
                [*self._command, str(child_end.fileno())],
                pass_fds=[child_end.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # stderr, because stdout is for results
                start_new_session=True,  # so that Ctrl-C reaches only training
                env=os.environ | {"TMPDIR": temporary},
            )
        with self._changed:
            self._process, self._connection, self._temporary = process, own_end, temporary
            self._started_at = self._progress_at = time.monotonic()
            self._opened, self._delivered = False, 0
            if self._given_up:
                self._kill()

    def _run(self) -> None:
        try:
            self._serve_with_one_restart()
        finally:
            with self._changed:
                self._ended = True
                self._calls.clear()
                os.close(self._new_calls)
                self._changed.notify_all()

    def _serve_with_one_restart(self) -> None:
        reason = self._serve()
        if reason and not self._given_up:
            self._warn(f"{reason}; restarting it with all rows; training continues")
            try:
                self._start()
                reason = self._serve()
            except OSError as error:
                reason = f"cannot be started ({error.strerror or error})"
            if reason and not self._given_up:
                self._warn(f"{reason}; disabled from now on; training continues; {self._advice()}")

    def _serve(self) -> str:
        """Forward calls to the process until `close` is delivered. Return why it ended early, or an empty string."""
        with self._connection as connection:
            try:
                connection.send((*self._open_arguments, self._first_opened and self._first_opened.position))
                reason = self._forward_calls(connection)
            except (EOFError, OSError):
                reason = f"its process ended ({_describe_exit(self._process.wait())})"
        self._process.wait()
        shutil.rmtree(self._temporary, ignore_errors=True)
        return reason

    def _forward_calls(self, connection: Connection) -> str:
        sent, idle, late = 0, False, False
        while True:
            if idle and sent < len(self._calls):
                connection.send_bytes(self._calls[sent].pickled)
                sent, idle = sent + 1, False
            remaining = self._started_at + self._open_seconds - time.monotonic()
            timeout = None if late or self._opened else max(0.0, remaining)
            ready = wait([connection, self._new_calls], timeout)
            if self._new_calls in ready:
                os.eventfd_read(self._new_calls)
            if connection in ready:
                report: Report = connection.recv()
                if isinstance(report, Failed):
                    return report.reason
                idle |= isinstance(report, Opened | Delivered)
                if self._handle_report(report, late):
                    return ""
            elif not ready:
                late = True
                self._warn(f"not open after {self._open_seconds:g} s; training continues, and rows are queued")

    def _handle_report(self, report: Report, late: bool) -> bool:
        """Handle a report of the process; return whether all calls are delivered and the tracker is closed."""
        with self._changed:
            self._progress_at = time.monotonic()
            if isinstance(report, Opened):
                self._opened = True
                self._first_opened, self._last_opened = self._first_opened or report, report
                if late:
                    self._print(
                        f"{self._name}: open after {self._progress_at - self._started_at:.0f} s; it gets all rows"
                    )
            elif isinstance(report, Delivered):
                self._delivered += 1
            self._changed.notify_all()
            return self._closing and self._delivered == len(self._calls)

    def _kill(self) -> None:
        """Kill the process and its child processes."""
        if self._process.poll() is None:
            for process in (*child_processes(self._process.pid), self._process.pid):
                with suppress(ProcessLookupError):  # it has already ended
                    os.kill(process, signal.SIGKILL)

    def _warn(self, text: str) -> None:
        self._print(f"warning: {self._name}: {text}")

    def _print(self, text: str) -> None:
        # A single write, so that lines from different threads do not mix.
        print(f"{text}\n", end="", file=sys.stderr, flush=True)


def _describe_exit(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {-code}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")

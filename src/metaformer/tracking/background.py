"""A tracker that may be slow, stuck or broken, in a process of its own, kept out of training's way."""

import os
import pickle
import signal
import subprocess
import sys
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
from metaformer.tracking.service import Delivered, Failed, Opened, Report, child_processes

# When training was interrupted or failed: less than the other ranks wait for rank 0 to say why.
CLOSE_SECONDS_OF_FAILED = 4.0
SILENT_SECONDS = 1.5  # of the final wait, before a line says what it waits for


class _Call(NamedTuple):
    """One call, kept until the end for a second start: a row takes 300 bytes."""

    kind: str  # "row", "file", or "" where it is not worth counting
    pickled: bytes


class BackgroundTracker:
    """Hands every call to a process that opens the tracker and passes it the calls in order; never blocks the caller.

    A process that ends before it is told to is started once more and gets all calls again.

    Args:
        name: for messages.
        command: starts the process; the number of a file descriptor is added to it.
        opening: what the process needs to open the tracker (see `Server`).
        open_seconds: after which opening counts as late, which is said, and not waited for at the end.
        close_seconds: without progress, after which what is not delivered when training has ended is given up.
    """

    def __init__(
        self, name: str, command: Sequence[str], opening: tuple[Any, ...], open_seconds: float, close_seconds: float
    ) -> None:
        self._name, self._command, self._opening = name, command, opening
        self._open_seconds, self._close_seconds = open_seconds, close_seconds
        self._calls: list[_Call] = []
        self._news = os.eventfd(0, os.EFD_CLOEXEC)  # counts calls that the thread has not seen
        self._changed = threading.Condition()  # guards all below
        self._delivered = 0
        self._opened = self._closing = self._given_up = self._ended = False
        self._first: Opened | None = None
        self._latest: Opened | None = None
        self._began = self._progressed = 0.0
        try:
            self._start()  # here, where no other thread of training starts processes
        except OSError as error:
            self._ended = True
            self._warn(f"cannot be started ({error.strerror or error}); training goes on without")
            return
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def metrics(self, row: Row) -> None:
        self._hand_over("row", methodcaller("metrics", row))

    def message(self, text: str) -> None:
        self._hand_over("", methodcaller("message", text))

    def picture(self, name: str, file: Path) -> None:
        self._hand_over("file", methodcaller("picture", name, file))

    def checkpoint(self, folder: Path, aliases: list[str]) -> None:
        self._hand_over("file", methodcaller("checkpoint", folder, aliases))

    def close(self, failed: bool) -> None:
        """Wait until all is delivered, as long as there is progress; not for long where training failed."""
        began, said = time.monotonic(), failed
        with self._changed:
            self._hand_over("", methodcaller("close", failed))
            self._closing, self._progressed = True, began
            while not self._ended and (now := time.monotonic()) < (end := self._end_of_patience(began, failed)):
                if not said and now >= began + SILENT_SECONDS:
                    self._say(f"waiting      {self._name}: {self._awaited()}, up to {end - now:.0f} s")
                    said = True
                self._changed.wait((end if said else min(end, began + SILENT_SECONDS)) - now)
            if not self._ended:
                self._given_up = True
                self._warn(f"{self._why_given_up(failed)}; still missing: {self._awaited()}; {self._advice()}")
                self._kill()

    def _end_of_patience(self, began: float, failed: bool) -> float:
        if failed:
            return began + min(CLOSE_SECONDS_OF_FAILED, self._close_seconds)
        patience = self._progressed + self._close_seconds
        return patience if self._opened else min(patience, self._began + self._open_seconds)

    def _why_given_up(self, failed: bool) -> str:
        if not self._opened:
            return "has not opened"
        return "had no time to finish" if failed else f"no progress in {self._close_seconds:g} s"

    def _awaited(self) -> str:
        kinds = Counter(call.kind for call in self._calls[self._delivered :])
        if not kinds["row"] + kinds["file"]:
            return "the end of its upload"
        return f"{_count(kinds['row'], 'row')} and {_count(kinds['file'], 'file')} to deliver"

    def _advice(self) -> str:
        upload = f"`{self._latest.upload}` uploads what it has; " if self._latest else ""
        return f"{upload}the run folder has all rows"

    def _hand_over(self, kind: str, call: Any) -> None:
        with self._changed:
            if not self._ended:
                self._calls.append(_Call(kind, pickle.dumps(call)))
                os.eventfd_write(self._news, 1)

    def _start(self) -> None:
        ours, theirs = Pipe()
        with theirs:
            process = subprocess.Popen(
                [*self._command, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # stdout is for results
                start_new_session=True,  # a Ctrl-C is for training
            )
        with self._changed:
            self._process, self._connection = process, ours
            self._began = self._progressed = time.monotonic()
            self._opened, self._delivered = False, 0
            if self._given_up:
                self._kill()

    def _work(self) -> None:
        try:
            self._serve_twice_at_most()
        finally:
            with self._changed:
                self._ended = True
                self._calls.clear()
                os.close(self._news)
                self._changed.notify_all()

    def _serve_twice_at_most(self) -> None:
        reason = self._serve()
        if reason and not self._given_up:
            self._warn(f"{reason}; starting it again with all rows, training goes on")
            try:
                self._start()
                reason = self._serve()
            except OSError as error:
                reason = f"cannot be started ({error.strerror or error})"
            if reason and not self._given_up:
                self._warn(f"{reason}; off from here, training goes on; {self._advice()}")

    def _serve(self) -> str:
        """Pass all calls to the process, until `close` is delivered; return why it ended before that, or nothing."""
        with self._connection as connection:
            try:
                connection.send((*self._opening, self._first and self._first.position))
                reason = self._converse(connection)
            except (EOFError, OSError):
                reason = f"its process ended ({_ending(self._process.wait())})"
        self._process.wait()
        return reason

    def _converse(self, connection: Connection) -> str:
        sent, idle, late = 0, False, False
        while True:
            if idle and sent < len(self._calls):
                connection.send_bytes(self._calls[sent].pickled)
                sent, idle = sent + 1, False
            patience = None if late or self._opened else max(0.0, self._began + self._open_seconds - time.monotonic())
            ready = wait([connection, self._news], patience)
            if self._news in ready:
                os.eventfd_read(self._news)
            if connection in ready:
                report: Report = connection.recv()
                if isinstance(report, Failed):
                    return report.reason
                idle |= isinstance(report, Opened | Delivered)
                if self._note(report, late):
                    return ""
            elif not ready:
                late = True
                self._warn(f"not open after {self._open_seconds:g} s; training goes on, rows wait for it")

    def _note(self, report: Report, late: bool) -> bool:
        """Note what the process reports; return whether all is done."""
        with self._changed:
            self._progressed = time.monotonic()
            if isinstance(report, Opened):
                self._opened, self._first, self._latest = True, self._first or report, report
                if late:
                    self._say(f"{self._name}: open after {self._progressed - self._began:.0f} s; it gets all rows")
            elif isinstance(report, Delivered):
                self._delivered += 1
            self._changed.notify_all()
            return self._closing and self._delivered == len(self._calls)

    def _kill(self) -> None:
        """End the process and what it has started."""
        if self._process.poll() is None:
            for process in (*child_processes(self._process.pid), self._process.pid):
                with suppress(ProcessLookupError):  # it has ended
                    os.kill(process, signal.SIGKILL)

    def _warn(self, text: str) -> None:
        self._say(f"warning: {self._name}: {text}")

    def _say(self, text: str) -> None:
        print(f"{text}\n", end="", file=sys.stderr, flush=True)  # in one piece


def _ending(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {-code}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")

"""A tracker in a process of its own: what the two sides say to each other, and the tracker's side."""

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from metaformer.interfaces import Tracker
from metaformer.signals import STOP_SIGNALS

WATCH_SECONDS = 0.25  # between two looks at the service

Call = Callable[[Tracker], None]


class Opened(NamedTuple):
    """The tracker is ready.

    Attributes:
        upload: the command that uploads later what the tracker has on disk.
        position: rows that the service had already, where it counts them; the next start is told those of the first.
    """

    upload: str
    position: int | None


class Delivered(NamedTuple):
    """The tracker has done what the last call asked for."""


class Progressed(NamedTuple):
    """Bytes moved since the last report."""


class Failed(NamedTuple):
    """The tracker's process ends."""

    reason: str


Report = Opened | Delivered | Progressed | Failed


class ServedTracker(Tracker, Protocol):
    """A tracker that can be watched from another thread."""

    def open(self, *opening: Any) -> Opened:
        """Make it ready, which may take long, and fail."""

    def check(self) -> None:
        """Raise an error where the service that the tracker depends on has died, also while it opens."""

    def bytes_moved(self) -> int:
        """Return a number that grows as long as closing makes progress."""


class Server:
    """Opens a tracker and passes it every call that arrives, until the other side goes away.

    Any failure is reported and ends the process: nothing of the tracker is left in an unknown state.

    The first message holds what the tracker opens with, each other one a call.
    """

    def __init__(self, connection: Connection, tracker: ServedTracker) -> None:
        self._connection, self._tracker = connection, tracker
        self._sending = threading.Lock()

    def run(self) -> None:
        """Serve, and end the process."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # the training process decides when to stop
        threading.Thread(target=self._watch, args=(os.getppid(),), daemon=True).start()
        try:
            self._report(self._tracker.open(*self._receive()))
            while True:
                call: Call = self._receive()
                call(self._tracker)
                self._report(Delivered())
        except (Exception, SystemExit) as error:
            self._fail(error)

    def _cause(self) -> Exception | None:
        """Return what `check` says of a dead service, which shows in other errors too: its connection is lost first."""
        end = time.monotonic() + WATCH_SECONDS
        while time.monotonic() < end:
            try:
                self._tracker.check()
            except Exception as error:
                return error
            time.sleep(0.01)
        return None

    def _receive(self) -> Any:
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            os._exit(0)  # the training process has what it wanted, or is gone

    def _watch(self, parent: int) -> None:
        moved = 0
        while os.getppid() == parent:
            time.sleep(WATCH_SECONDS)
            try:
                self._tracker.check()
                if (now := self._tracker.bytes_moved()) > moved:
                    moved = now
                    self._report(Progressed())
            except Exception as error:
                self._fail(error)
        os._exit(1)  # training is gone

    def _report(self, report: Report) -> None:
        with self._sending:
            self._connection.send(report)

    def _fail(self, error: BaseException) -> None:
        error = self._cause() or error
        try:
            self._report(Failed(" ".join(f"{error}".split()) or type(error).__name__))
        finally:
            os._exit(1)


def child_processes(process: int) -> list[int]:
    """The processes that a process has started; none where it has ended."""
    children: list[int] = []
    try:
        for file in Path(f"/proc/{process}/task").glob("*/children"):
            with suppress(OSError):  # the thread has ended
                children += map(int, file.read_text().split())
    except OSError:  # the process has ended
        return []
    return children

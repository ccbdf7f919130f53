"""The process that serves a `BackgroundTracker`: its messages and its main loop."""

import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol

from metaformer.errors import one_line
from metaformer.interfaces import Tracker
from metaformer.signals import STOP_SIGNALS

TEMPORARY_PREFIX = "tracker-"  # prefix of the temporary folder that each of these processes gets
WATCH_SECONDS = 0.25  # seconds between two checks of the service

Call = Callable[[Tracker], None]


class Opened(NamedTuple):
    """The tracker is ready.

    Attributes:
        upload_command: Command that uploads the tracker's files later; "" if there is none.
        position: Number of rows that the service already had, or None if it does not count them. A restarted process
            receives the position of the first start.
    """

    upload_command: str
    position: int | None


class Delivered(NamedTuple):
    """The tracker has finished the last call."""


class Progressed(NamedTuple):
    """Bytes have been moved since the last report."""


class Failed(NamedTuple):
    """The tracker has failed, and its process ends."""

    reason: str


Report = Opened | Delivered | Progressed | Failed


class ServedTracker(Tracker, Protocol):
    """A tracker that can be watched from another thread."""

    def open(self, *arguments: Any) -> Opened:
        """Open the tracker; this may take long, and may fail."""

    def check(self) -> None:
        """Raise an error if the service that the tracker depends on has died; called during `open` too."""

    def bytes_moved(self) -> int:
        """Return a number that grows while closing makes progress."""


class Server:
    """The main loop of a tracker's process: it opens the tracker and forwards calls to it.

    The first message contains the arguments of `open`; each later message is a call. Any failure is reported and ends
    the process, so that no tracker continues in an unknown state.
    """

    def __init__(self, connection: Connection, tracker: ServedTracker) -> None:
        self._connection, self._tracker = connection, tracker
        self._sending = threading.Lock()

    def run(self) -> None:
        """Serve calls until the connection closes, then exit the process."""
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
        """Return the error of `check` if the service has died; its lost connection may have raised another error."""
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
            self._leave(0)  # the training process has closed the connection, or has ended

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
        self._leave(1)  # the training process has ended

    def _leave(self, code: int) -> NoReturn:
        """Exit, and remove the temporary folder, which the training process can no longer do if it was killed."""
        folder = Path(tempfile.gettempdir())
        if folder.name.startswith(TEMPORARY_PREFIX):
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(code)

    def _report(self, report: Report) -> None:
        with self._sending:
            self._connection.send(report)

    def _fail(self, error: BaseException) -> None:
        error = self._cause() or error
        try:
            self._report(Failed(one_line(error) or type(error).__name__))
        finally:
            os._exit(1)


def child_processes(process: int) -> list[int]:
    """Return the child processes of a process, or an empty list if it has ended."""
    children: list[int] = []
    try:
        for file in Path(f"/proc/{process}/task").glob("*/children"):
            with suppress(OSError):  # the thread has ended
                children += map(int, file.read_text().split())
    except OSError:  # the process has ended
        return []
    return children

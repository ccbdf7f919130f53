"""Stops on signals: handlers set a flag, the ranks agree at a step boundary, and all stop after the same step."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from metaformer.errors import Interrupted
from metaformer.runtime import Runtime, Vote
from metaformer.signals import STOP_SIGNALS

# One Ctrl-C reaches a process several times: from the terminal and from torchrun. A later signal is a second Ctrl-C.
SECONDS_OF_ONE_KEYSTROKE = 2.0


class StopWaitingError(Exception):
    """Raised when a signal arrives during a wait for data."""


@contextmanager
def interruptible_start() -> Iterator[None]:
    """Within the block, let a stop signal raise `Interrupted` in the main thread once, as there is nothing to save yet.

    Later signals are ignored until an interrupted process ends, as in `Interruption.listening`.
    """
    since: list[float] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if since:
            _end_at_second_ctrl_c(number, since[0])
            return
        since.append(time.monotonic())
        raise Interrupted(f"{signal.Signals(number).name}: before the first step; run the same command again")

    with _handling(handle):
        yield


class Interruption:
    """A request to stop. The signal handler only sets a flag, because it may run anywhere in a step."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._signal: int | None = None
        self._since = 0.0
        self._answered = False
        self._may_raise = False
        self._vote: Vote | None = None

    @property
    def requested(self) -> bool:
        """Whether this rank has been asked to stop."""
        return self._signal is not None

    @property
    def pending(self) -> bool:
        """Whether this rank has been asked to stop and the ranks have not agreed to do so yet."""
        return self.requested and not self._answered

    @property
    def reason(self) -> str:
        """The name of the signal, for messages."""
        return signal.Signals(self._signal).name if self._signal is not None else "a signal to another rank"

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Let signals set the flag instead of ending the process, within the block and after an interruption.

        torchrun sends SIGTERM to the remaining ranks when the first one has ended.
        """
        with _handling(self._handle):
            yield

    def agreed(self) -> bool:
        """Return whether the ranks stop here, which is the same on all. Call it after each step or validation batch.

        A request on one rank is known to all ranks one call later, because the exchange overlaps with the step between.
        """
        if self._runtime.world_size == 1:
            self._answered = self.requested
            return self.requested
        stop = self._vote is not None and self._vote.result() > 0
        self._vote = None if stop else self._runtime.start_vote(self.requested)
        self._answered = stop
        return stop

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Let a signal raise `StopWaitingError` within the block, for waits that may never end.

        With several ranks, signals raise nothing here: a single rank cannot save, and the watchdog limits the wait.
        """
        self._may_raise = self._runtime.world_size == 1
        try:
            if self._may_raise and self.requested:
                raise StopWaitingError
            yield
        finally:
            self._may_raise = False

    def finish_vote(self) -> None:
        """Wait for the last exchange. Call it before the process group is destroyed."""
        if self._vote is not None:
            self._vote.result()
            self._vote = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signal is None:
            self._signal, self._since = number, time.monotonic()
        else:
            _end_at_second_ctrl_c(number, self._since)
        if self._may_raise:
            self._may_raise = False
            raise StopWaitingError


@contextmanager
def _handling(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle stop signals within the block, and also after it if `Interrupted` was raised.

    A SIGHUP that is ignored, as under nohup, stays ignored.
    """
    numbers = [n for n in STOP_SIGNALS if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]
    former: dict[signal.Signals, Any] = {number: signal.signal(number, handle) for number in numbers}
    interrupted = False
    try:
        yield
    except Interrupted:
        interrupted = True
        raise
    finally:
        if not interrupted:
            for number, handler in former.items():
                signal.signal(number, handler)


def _end_at_second_ctrl_c(number: int, since: float) -> None:
    if number == signal.SIGINT and time.monotonic() - since > SECONDS_OF_ONE_KEYSTROKE:
        os._exit(128 + number)  # checkpoints are complete at any moment

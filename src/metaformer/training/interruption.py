"""Being asked to stop: signals set a flag, the ranks agree at a step boundary, and all stop after the same step."""

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

# One Ctrl-C reaches a process several times: from the terminal and from torchrun. A later one means it.
SECONDS_OF_ONE_KEYSTROKE = 2.0


class StopWaitingError(Exception):
    """A signal arrived during a wait."""


@contextmanager
def interruptible_start() -> Iterator[None]:
    """While a stop signal raises `Interrupted` wherever the main thread is, once: there is nothing to save yet.

    As in `Interruption.listening`, later signals change nothing, to the end of an interrupted process.
    """
    since: list[float] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if since:
            _end_at_second_ctrl_c(number, since[0])
            return
        since.append(time.monotonic())
        raise Interrupted(f"{signal.Signals(number).name}: before the first step; the same command starts again")

    with _handling(handle):
        yield


class Interruption:
    """Whether a rank has been asked to stop. Nothing is saved in a handler: it may run anywhere in a step."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._signal: int | None = None
        self._since = 0.0
        self._answered = False
        self._may_raise = False
        self._vote: Vote | None = None

    @property
    def requested(self) -> bool:
        """Whether this rank has been asked."""
        return self._signal is not None

    @property
    def pending(self) -> bool:
        """Whether this rank has been asked, and the ranks have not agreed to stop yet."""
        return self.requested and not self._answered

    @property
    def reason(self) -> str:
        """For people."""
        return signal.Signals(self._signal).name if self._signal is not None else "a signal to another rank"

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While signals set the flag instead of ending the process; after an interruption they do so to its end.

        For torchrun sends SIGTERM to those that are left when the first rank has gone.
        """
        with _handling(self._handle):
            yield

    def agreed(self) -> bool:
        """At each boundary of a step or a validation batch: whether the ranks stop here; the same answer on all.

        What a rank knows at one boundary, all know at the next: the exchange runs beside the step between.
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
        """A block that a signal leaves at once, by `StopWaitingError`: for a wait that may never end.

        With several ranks it is not left: a rank by itself cannot save, and the watchdog bounds the wait.
        """
        self._may_raise = self._runtime.world_size == 1
        try:
            if self._may_raise and self.requested:
                raise StopWaitingError
            yield
        finally:
            self._may_raise = False

    def settle(self) -> None:
        """Let the last exchange end, before the ranks part."""
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
    """Handle stop signals inside the block, and after it where an interruption leaves it.

    A SIGHUP that nohup has had ignored stays ignored.
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
        os._exit(128 + number)  # at once; checkpoints are whole at any moment

"""No silent hang: a rank that makes no progress writes all stacks of its node to disk and ends the job."""

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

EXIT_CODE = 4
DUMP_SECONDS = 2.0  # for the other processes of the node to write their stacks
# Of the bound, and seconds: until a timer that needs no Python ends a process whose threads cannot run.
BACKSTOP, BACKSTOP_SECONDS = 1.25, 2 * DUMP_SECONDS


class Watchdog:
    """Expects a beat at every step, validation batch and save of this rank.

    Where none comes for `stall_seconds` (a dead node, a lost network, a file system that does not answer), the stacks
    of all threads go to FOLDER/rank-R.txt, the node's other ranks are made to write theirs too, also those that were
    stopped by SIGSTOP, and the process ends with exit code 4: torchrun then ends the others.

    Args:
        peers: process ids of this node's ranks.
    """

    def __init__(self, folder: Path, rank: int, peers: list[int], stall_seconds: float) -> None:
        self._file, self._rank, self._stall_seconds = folder / f"rank-{rank}.txt", rank, stall_seconds
        self._peers = [pid for pid in peers if pid != os.getpid()]
        self._beat_at = self._timer_set_at = time.monotonic()
        self._ended = threading.Event()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While beats are expected."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        with self._file.open("a") as self._stacks:
            faulthandler.register(signal.SIGUSR2, self._stacks, all_threads=True)  # what peers send
            self._set_timer()
            self.beat()
            thread.start()
            try:
                yield
            finally:
                self._ended.set()
                thread.join()
                faulthandler.cancel_dump_traceback_later()
                faulthandler.unregister(signal.SIGUSR2)
                self._remove_empty()

    def beat(self) -> None:
        """This rank goes on."""
        self._beat_at = time.monotonic()
        if self._beat_at - self._timer_set_at > self._stall_seconds / 10:
            self._set_timer()

    def _remove_empty(self) -> None:
        with suppress(OSError):  # the run folder is gone, or other ranks' stacks are there
            if self._file.stat().st_size == 0:
                self._file.unlink()
            self._file.parent.rmdir()

    def _set_timer(self) -> None:
        self._timer_set_at = time.monotonic()
        seconds = BACKSTOP * self._stall_seconds + BACKSTOP_SECONDS
        faulthandler.dump_traceback_later(seconds, file=self._stacks, exit=True)

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self._stall_seconds / 10)):
            stalled = time.monotonic() - self._beat_at
            if stalled > self._stall_seconds:
                try:
                    self._write_stacks(stalled)
                finally:  # also where nobody reads stderr any more
                    os._exit(EXIT_CODE)

    def _write_stacks(self, stalled: float) -> None:
        faulthandler.dump_traceback(self._stacks, all_threads=True)
        for pid in self._peers:
            with suppress(OSError):  # it has ended, and its number may be another user's process
                os.kill(pid, signal.SIGUSR2)
                os.kill(pid, signal.SIGCONT)  # one that was stopped writes its stacks when it goes on
        print(
            f"error: rank {self._rank}: no step for {stalled:.0f} s (guards.stall_seconds={self._stall_seconds:g}); "
            f"stacks of the node's ranks: {self._file.parent}; the same command goes on from the last checkpoint",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        time.sleep(DUMP_SECONDS)

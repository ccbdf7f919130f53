"""No silent hang: a rank that makes no progress writes all stacks of its node to disk and ends the job."""

import faulthandler
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from metaformer.signals import blocked_in_children
from metaformer.training import backstop

EXIT_CODE = 4
DUMP_SECONDS = 2.0  # for the other processes of the node to write their stacks
TICK = 1.0  # seconds
# A process whose threads cannot run is killed after BACKSTOP x stall_seconds + BACKSTOP_SECONDS.
BACKSTOP, BACKSTOP_SECONDS = 1.25, 2 * DUMP_SECONDS


class Watchdog:
    """Expects a beat at every step, validation batch and save of this rank.

    Without one for `stall_seconds` (a dead node, a lost network, a file system that does not answer), the stacks of all
    threads go to FOLDER/rank-R.txt, the node's other ranks write theirs too, also those stopped by SIGSTOP, and the
    process ends with exit code 4: torchrun then ends the others. Time during which the process did not run (SIGSTOP, a
    suspended machine) does not count. A process whose threads cannot run at all is killed by `backstop`.

    Args:
        peers: process ids of this node's ranks.
    """

    def __init__(self, folder: Path, rank: int, peers: list[int], stall_seconds: float) -> None:
        self._file, self._rank, self._stall_seconds = folder / f"rank-{rank}.txt", rank, stall_seconds
        self._peers = [pid for pid in peers if pid != os.getpid()]
        self._stalled = 0.0  # seconds since the last beat
        self._told_backstop_at = 0.0
        self._ended = threading.Event()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Expect beats inside the block."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        with self._file.open("a") as self._stacks:
            faulthandler.register(signal.SIGUSR2, self._stacks, all_threads=True)  # what peers and the backstop send
            backstop_process = self._start_backstop()
            assert backstop_process.stdin is not None
            self._beats = backstop_process.stdin.fileno()
            self.beat()
            thread.start()
            try:
                yield
            finally:
                self._ended.set()
                thread.join()
                backstop_process.communicate()  # it ends with its stdin
                faulthandler.unregister(signal.SIGUSR2)
                self._remove_empty()

    def beat(self) -> None:
        """Report progress of this rank."""
        self._stalled = 0.0
        now = time.monotonic()
        if now - self._told_backstop_at > self._stall_seconds / 10:
            self._told_backstop_at = now
            with suppress(BrokenPipeError):  # somebody killed it; the thread still watches
                os.write(self._beats, b".")

    def _remove_empty(self) -> None:
        with suppress(OSError):  # the run folder is gone, or other ranks' stacks are there
            if self._file.stat().st_size == 0:
                self._file.unlink()
            self._file.parent.rmdir()

    def _start_backstop(self) -> subprocess.Popen[bytes]:
        seconds = BACKSTOP * self._stall_seconds + BACKSTOP_SECONDS
        command = [sys.executable, "-I", "-S", backstop.__file__, str(os.getpid()), str(seconds), str(DUMP_SECONDS)]
        with blocked_in_children():
            return subprocess.Popen(command, stdin=subprocess.PIPE)

    def _watch(self) -> None:
        tick = min(TICK, self._stall_seconds / 10)
        before = time.monotonic()
        while not self._ended.wait(tick):
            now = time.monotonic()
            self._stalled += min(now - before, 2 * tick)  # a longer pause: the process was stopped
            before = now
            if self._stalled > self._stall_seconds:
                try:
                    self._write_stacks(self._stalled)
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

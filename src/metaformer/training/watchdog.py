"""The watchdog: a rank that makes no progress writes the stacks of its node's processes to disk and ends the job."""

import faulthandler
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from metaformer.signals import blocked_in_children
from metaformer.training import backstop

EXIT_CODE = 4
DUMP_SECONDS = 2.0  # time for the other processes of the node to write their stacks
TICK = 1.0  # seconds
STDERR = 2
STOP_SECONDS = 15.0  # torchrun allows 30
COMPILE_SECONDS = 1800.0  # the process group's timeout, in which all ranks must have compiled
# The backstop kills a process whose threads cannot run after BACKSTOP x stall_seconds + BACKSTOP_SECONDS.
BACKSTOP, BACKSTOP_SECONDS = 1.25, 2 * DUMP_SECONDS


class Watchdog:
    """Ends the process if this rank reports no progress.

    `beat` is called at every step, validation batch and save, and at each stage of the start. Without a beat for
    `stall_seconds` (a dead node, a lost network, a file system that does not answer), the stacks of all threads are
    written to FOLDER/rank-R.txt, the node's other ranks write theirs too, even if SIGSTOP has stopped them, and the
    process ends with exit code 4; torchrun then ends the other ranks. Time during which the process did not run
    (SIGSTOP, a suspended machine) does not count. `backstop` kills a process whose threads cannot run at all.

    With `compiles`, the first step and the first validation, which compile the network, may together take
    `COMPILE_SECONDS` more.

    A rank that has been asked to stop gets `STOP_SECONDS`, or three times its last step, because the sender of the
    signal has a time limit too.
    """

    def __init__(self, rank: int, stall_seconds: float, compiles: bool = False) -> None:
        self._rank, self._stall_seconds = rank, stall_seconds
        self._folder: Path | None = None
        self._stacks = STDERR  # file descriptor: stderr until there is a folder
        self._peers: list[int] = []
        self._is_asked_to_stop: Callable[[], bool] = lambda: False
        self._stalled = 0.0  # seconds since the last beat in which the process ran
        self._beat_at, self._last_interval, self._last_step = time.monotonic(), 0.0, 0.0
        self._compiling = False
        self._allowance = COMPILE_SECONDS if compiles else 0.0  # what is left of it
        self._begun: set[str] = set()  # kinds of work for which the network has been compiled
        self._is_starting, self._paused = True, False
        self._beats: int | None = None  # the backstop's pipe
        self._told_backstop_at = 0.0
        self._ended = threading.Event()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch this rank within the block."""
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        faulthandler.register(signal.SIGUSR2, self._stacks, all_threads=True)  # sent by peers and the backstop
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
            self._beats = None
            backstop_process.communicate()  # it ends with its stdin
            faulthandler.unregister(signal.SIGUSR2)
            if self._folder is not None:
                os.close(self._stacks)
                self._remove_empty(self._folder)

    def training_begins(self, folder: Path, peers: list[int], is_asked_to_stop: Callable[[], bool]) -> None:
        """Write stacks to a folder from now on, and ignore `pause`.

        Args:
            peers: process ids of this node's ranks.
            is_asked_to_stop: returns whether this rank has been asked to stop and the ranks have not agreed yet.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._stacks = folder, os.open(self._file(folder), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        if self._beats is not None:
            faulthandler.register(signal.SIGUSR2, self._stacks, all_threads=True)
        self._peers = [pid for pid in peers if pid != os.getpid()]
        self._is_asked_to_stop = is_asked_to_stop
        self._is_starting = False
        self.beat()

    def training_ends(self) -> None:
        """Stop watching, because the remaining work, such as uploads, has its own time limits."""
        self._is_asked_to_stop, self._paused = (lambda: False), True

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Expect no beat within the block during the start, while one rank scans a data set or downloads a file.

        Only the process group's timeout notices a rank that hangs there.
        """
        if not self._is_starting:
            yield
            return
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before
            self.beat()

    @contextmanager
    def compiling(self, kind: str) -> Iterator[None]:
        """Allow for compiling the network within the first block of this kind."""
        self._compiling = kind not in self._begun
        self._begun.add(kind)
        try:
            yield
        finally:
            self._compiling = False

    @contextmanager
    def step(self) -> Iterator[None]:
        """Take a training step within the block."""
        began = time.monotonic()
        with self.compiling("step"):
            yield
        self._last_step = time.monotonic() - began

    def beat(self) -> None:
        """Report progress of this rank."""
        now = time.monotonic()
        self._last_interval, self._beat_at = now - self._beat_at, now
        self._start_anew(now)

    def _start_anew(self, now: float) -> None:
        """Count the time without a beat from now on, here and in the backstop."""
        self._stalled = 0.0
        if self._beats is not None and now - self._told_backstop_at > self._stall_seconds / 10:
            self._told_backstop_at = now
            with suppress(BrokenPipeError):  # the backstop was killed; the thread still watches
                os.write(self._beats, b".")

    def _file(self, folder: Path) -> Path:
        return folder / f"rank-{self._rank}.txt"

    def _remove_empty(self, folder: Path) -> None:
        file = self._file(folder)
        with suppress(OSError):  # the run folder is gone, or holds other ranks' stacks
            if file.stat().st_size == 0:
                file.unlink()
            folder.rmdir()

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
            elapsed = min(now - before, 2 * tick)  # a longer pause: the process was stopped
            before = now
            self._stalled += elapsed
            self._allowance -= elapsed if self._compiling else 0.0
            if self._paused or (self._compiling and self._allowance > 0 and not self._is_asked_to_stop()):
                self._start_anew(now)
            if self._stalled > self._limit():
                try:
                    self._write_stacks(self._stalled)
                finally:  # even if nobody reads stderr any more
                    os._exit(EXIT_CODE)

    def _limit(self) -> float:
        """Return the seconds without a beat after which the rank ends."""
        if not self._is_asked_to_stop():
            return self._stall_seconds
        return min(self._stall_seconds, max(STOP_SECONDS, 3 * max(self._last_step, self._last_interval)))

    def _write_stacks(self, stalled: float) -> None:
        faulthandler.dump_traceback(self._stacks, all_threads=True)
        for pid in self._peers:
            with suppress(OSError):  # it has ended, and its number may be another user's process
                os.kill(pid, signal.SIGUSR2)
                os.kill(pid, signal.SIGCONT)  # a stopped process writes its stacks once it continues
        why = f"guards.stall_seconds={self._stall_seconds:g}"
        if self._is_asked_to_stop():
            why = "it was asked to stop, and waited for data or for another rank"
        where = f"stacks of the node's ranks: {self._folder}"
        if self._folder is None:
            where = "its stacks are above; training had not begun"
        print(
            f"error: rank {self._rank}: no step for {stalled:.0f} s ({why}); {where}; "
            "the same command resumes from the last checkpoint",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        time.sleep(DUMP_SECONDS)

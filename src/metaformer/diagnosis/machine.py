"""Checks of a node: cores, shared memory, limits, signals and folders."""

import os
import resource
import shutil
import signal
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from metaformer.diagnosis.finding import Finding, fail, ok, warn
from metaformer.errors import UserError
from metaformer.files import check_temporary_folder, write_text_atomically

GIB = 2**30
MIN_OPEN_FILES = 4096


def limits(processes: int) -> Iterator[Finding]:
    """Check CPU cores, shared memory and resource limits for the number of training processes on this node."""
    cores = len(os.sched_getaffinity(0))
    if cores < processes:
        yield warn(
            "cores",
            f"{cores} for {processes} processes",
            "request more with --cpus-per-task, which counts the cores of a node",
        )
    else:
        yield ok("cores", f"{cores}, {cores / processes:g} a process")
    yield temporary_folder()
    yield shared_memory(shutil.disk_usage("/dev/shm").free, processes)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files != resource.RLIM_INFINITY and files < MIN_OPEN_FILES:
        yield warn("open files", f"at most {files}", f"ulimit -n {MIN_OPEN_FILES}")
    else:
        yield ok("open files", "unlimited" if files == resource.RLIM_INFINITY else f"at most {files}")
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if locked == resource.RLIM_INFINITY:
        yield ok("memlock", "unlimited")
    elif Path("/sys/class/infiniband").is_dir():
        yield warn("memlock", f"{locked // 1024} KiB", "ulimit -l unlimited: InfiniBand needs it")
    else:
        yield ok("memlock", f"{locked // 1024} KiB; only InfiniBand needs more, and there is none")


def shared_memory(free: int, processes: int) -> Finding:
    """Check that batches fit: 1 GiB per process is ample, and Docker's default of 64 MiB is not enough."""
    message = f"{free / GIB:.1f} GiB free in /dev/shm, {free / GIB / processes:.1f} GiB a process"
    fix = "in Docker, start with --ipc=host"
    if free < GIB // 4:
        return fail("shm", message, fix)
    return warn("shm", message, fix) if free < processes * GIB else ok("shm", message)


def temporary_folder() -> Finding:
    """Check that worker processes can open their sockets in the folder for temporary files."""
    try:
        check_temporary_folder()
    except UserError as error:
        message, _, fix = str(error).partition("; ")
        return fail("TMPDIR", message, fix)
    return ok("TMPDIR", tempfile.gettempdir())


def signals() -> Iterator[Finding]:
    """Check that SLURM's signals reach Python, by sending each of them to this process."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        blocked = number in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        ignored = signal.getsignal(number) is signal.SIG_IGN
        seconds = _signal_latency(number)
        if seconds is None:
            fix = "training could not save before a time limit; find out what starts Python with signals blocked"
            yield fail("signals", f"{number.name} does not arrive", fix)
        elif ignored and not blocked:
            yield ok("signals", f"{number.name}: ignored by the parent process, but handled in {1000 * seconds:.1f} ms")
        else:
            yield ok("signals", f"{number.name}: sent and handled in {1000 * seconds:.1f} ms")


def _signal_latency(number: signal.Signals) -> float | None:
    """Return the seconds until this process handles its own signal, or None if it does not within a second."""
    arrived: list[float] = []
    before = signal.signal(number, lambda *_: arrived.append(time.monotonic()))
    try:
        sent = time.monotonic()
        os.kill(os.getpid(), number)
        while not arrived and time.monotonic() < sent + 1:
            time.sleep(0.001)
    finally:
        signal.signal(number, before)
    return arrived[0] - sent if arrived else None


def run_folder(folder: Path) -> Iterator[Finding]:
    """Check that run folders can be written, and how much space is free."""
    probe = folder / f".doctor-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        write_text_atomically(probe, "0" * 2**20)
        seconds = time.monotonic() - start
        probe.unlink()
    except OSError as error:
        reason = error.strerror or error
        yield fail(
            "run folder",
            f"{folder}: cannot be written ({reason})",
            "choose another folder with --runs, or get write permission",
        )
        return
    yield ok("run folder", f"{folder}: written, synced and renamed in {1000 * seconds:.0f} ms")
    free = shutil.disk_usage(folder).free
    message = f"{free / GIB:.0f} GiB free for checkpoints in {folder}"
    if free < GIB:
        yield fail("disk", message, "free some space, or choose another folder with --runs")
    elif free < 20 * GIB:
        yield warn("disk", message, "a run of poolformer_m48 keeps about 5 GiB; see checkpoint.keep")
    else:
        yield ok("disk", message)

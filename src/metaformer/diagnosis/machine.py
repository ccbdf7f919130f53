"""The node: memory that processes share, limits, signals, and the folders."""

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
LEAST_FILES = 4096


def limits(processes: int) -> Iterator[Finding]:
    """CPU cores, shared memory and limits for so many training processes on this node."""
    cores = len(os.sched_getaffinity(0))
    if cores < processes:
        yield warn("cores", f"{cores} for {processes} processes", "ask for more: --cpus-per-task counts a node's cores")
    else:
        yield ok("cores", f"{cores}, {cores / processes:g} a process")
    yield temporary_folder()
    yield shared_memory(shutil.disk_usage("/dev/shm").free, processes)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files != resource.RLIM_INFINITY and files < LEAST_FILES:
        yield warn("open files", f"at most {files}", f"ulimit -n {LEAST_FILES}")
    else:
        yield ok("open files", "unlimited" if files == resource.RLIM_INFINITY else f"at most {files}")
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if locked == resource.RLIM_INFINITY:
        yield ok("memlock", "unlimited")
    elif Path("/sys/class/infiniband").is_dir():
        yield warn("memlock", f"{locked // 1024} KiB", "ulimit -l unlimited: InfiniBand needs it")
    else:
        yield ok("memlock", f"{locked // 1024} KiB; no InfiniBand here that would need more")


def shared_memory(free: int, processes: int) -> Finding:
    """Whether loaders' batches fit: 1 GiB a process is plenty, and Docker's default of 64 MiB is not enough."""
    said = f"{free / GIB:.1f} GiB free in /dev/shm for {processes} processes"
    mend = "in Docker, start with --ipc=host"
    if free < GIB // 4:
        return fail("shm", said, mend)
    return warn("shm", said, mend) if free < processes * GIB else ok("shm", said)


def temporary_folder() -> Finding:
    """Whether worker processes can open their sockets in the folder for temporary files."""
    try:
        check_temporary_folder()
    except UserError as error:
        said, _, mend = str(error).partition("; ")
        return fail("TMPDIR", said, mend)
    return ok("TMPDIR", tempfile.gettempdir())


def signals() -> Iterator[Finding]:
    """SLURM's signals must reach Python: each is sent to this process, which handles it."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        blocked = number in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        ignored = signal.getsignal(number) is signal.SIG_IGN
        took = _round_trip(number)
        if took is None:
            mend = "training could not save before a time limit; find what starts Python with signals blocked"
            yield fail("signals", f"{number.name} does not arrive", mend)
        elif ignored and not blocked:
            yield ok("signals", f"{number.name}: ignored by what started this, but handled; {1000 * took:.1f} ms")
        else:
            yield ok("signals", f"{number.name}: sent and handled in {1000 * took:.1f} ms")


def _round_trip(number: signal.Signals) -> float | None:
    """Seconds until this process has handled its own signal; None where it has not within a second."""
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
    """Whether runs can be written there, and how much fits."""
    probe = folder / f".doctor-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        write_text_atomically(probe, "0" * 2**20)
        took = time.monotonic() - start
        probe.unlink()
    except OSError as error:
        reason = error.strerror or error
        yield fail(
            "run folder", f"{folder}: cannot be written ({reason})", "give another with --runs, or its owner's leave"
        )
        return
    yield ok("run folder", f"{folder}: written, synced, renamed in {1000 * took:.0f} ms")
    free = shutil.disk_usage(folder).free
    said = f"{free / GIB:.0f} GiB free for checkpoints in {folder}"
    if free < GIB:
        yield fail("disk", said, "free some, or give another folder with --runs")
    elif free < 20 * GIB:
        yield warn("disk", said, "a run of poolformer_m48 keeps some 5 GiB; see checkpoint.keep")
    else:
        yield ok("disk", said)

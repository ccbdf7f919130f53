"""A process that ends with the one that started it, however that ends. Imports nothing that takes time."""

import ctypes
import os
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # of Linux's prctl


def end_with_launcher() -> None:
    """Have Linux send SIGTERM when torchrun dies, however: a rank that nobody watches saves and ends.

    Call it before anything that takes time: the ranks of a torchrun that was killed while they started would otherwise
    train unwatched, or wait for each other. Does nothing without torchrun.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    send_at_parents_death(signal.SIGTERM)
    if _is_orphan():
        print("error: torchrun has ended while this rank started; start it again", file=sys.stderr)
        sys.exit(1)


def send_at_parents_death(number: signal.Signals) -> None:
    """Have Linux send this process a signal when its parent (the thread that started it) ends.

    Raises:
        OSError: this system has no such thing.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0):
        error = ctypes.get_errno()
        raise OSError(error, f"prctl: {os.strerror(error)}")


def _is_orphan() -> bool:
    """Whether the launcher had gone before: orphans are adopted by process 1 or by a desktop session's systemd.

    In a container, torchrun may itself be process 1: it is a Python program, and what adopts is not.
    """
    parent = os.getppid()
    try:
        name = Path(f"/proc/{parent}/exe").readlink().name
    except OSError:  # another user's, or it has ended since
        return True
    return not name.startswith("python") if parent == 1 else name == "systemd"

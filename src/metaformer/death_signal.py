"""Signals that Linux sends to a process when its parent dies. Imports nothing that is slow to import."""

import ctypes
import os
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # an option of Linux's prctl


def end_with_launcher() -> None:
    """Make Linux send SIGTERM to this rank when torchrun dies for any reason, so that the rank saves and exits.

    Call this before anything slow. Otherwise ranks whose torchrun was killed while they started would train without a
    launcher, or wait for each other. Without torchrun this does nothing.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    set_parent_death_signal(signal.SIGTERM)
    if _is_orphan():
        print("error: torchrun ended while this rank was starting; start it again", file=sys.stderr)
        sys.exit(1)


def set_parent_death_signal(number: signal.Signals) -> None:
    """Make Linux send this process a signal when its parent (the thread that started it) ends.

    Raises:
        OSError: The system does not support it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0):
        error = ctypes.get_errno()
        raise OSError(error, f"prctl: {os.strerror(error)}")


def _is_orphan() -> bool:
    """Return whether the launcher has already ended.

    Orphans are adopted by process 1 or by a desktop session's systemd. In a container torchrun may itself be process 1,
    but torchrun is a Python program and an adopting process is not.
    """
    parent = os.getppid()
    try:
        name = Path(f"/proc/{parent}/exe").readlink().name
    except OSError:  # the parent belongs to another user, or has ended since
        return True
    return not name.startswith("python") if parent == 1 else name == "systemd"

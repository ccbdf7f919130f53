"""The signals that ask a run to stop, and how to block them in child processes."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


@contextmanager
def blocked_in_children() -> Iterator[None]:
    """Block stop signals in processes started inside the block. This process receives them when the block ends.

    Launchers signal a rank's whole process group, and a loader that exits before its rank would end the run. Unlike a
    handler, a signal mask survives exec, so a signal cannot end the new process at any moment.
    """
    former = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)

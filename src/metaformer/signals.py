"""Signals that ask a run to stop, kept away from the processes that serve a rank."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


@contextmanager
def blocked_in_children() -> Iterator[None]:
    """Start processes that never receive a stop signal; this process receives them when the block ends.

    Launchers signal a rank's whole process group, and a loader that ended before its rank would end the run. A signal
    mask, unlike a handler, survives exec, so that there is no moment at which a signal could end the new process.
    """
    former = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)

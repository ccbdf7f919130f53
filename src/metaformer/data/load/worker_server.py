"""The process that worker processes are forked from."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver, get_context, resource_tracker
from multiprocessing.context import ForkServerContext

from metaformer.files import check_temporary_folder
from metaformer.signals import blocked_in_children

ALWAYS = "metaformer.data.load.server_end"  # first
READERS = ("metaformer.data.load.pil_reader", "metaformer.data.load.torch_reader", "metaformer.data.load.worker_loader")


def worker_context() -> ForkServerContext:
    """The way to start workers: forked from a server that has one thread.

    A worker forked from the training process would inherit whatever the threads there hold at that moment: a lock, or
    the pipe by which wandb's start learns that its program runs. It would then keep that for as long as it lives.
    """
    return get_context("forkserver")


def start_worker_server(preload: Sequence[str] = READERS) -> None:
    """Start the server, or do nothing where it runs already.

    Args:
        preload: modules that it imports, while this process continues, so that workers find them imported.

    Raises:
        UserError: the folder for temporary files has too long a name.
    """
    check_temporary_folder()
    # A rank that is killed leaves its semaphores to Python's tracker, which removes them, and would print a warning.
    with _environment("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning"), blocked_in_children():
        # The tracker comes first, and signals are blocked anew after it: its start unblocks them.
        resource_tracker.ensure_running()
    # Else numpy, when the server imports it, would start a thread for each core.
    with _environment("OPENBLAS_NUM_THREADS", "1"), blocked_in_children():
        forkserver.set_forkserver_preload([ALWAYS, *preload])
        forkserver.ensure_running()


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Set a variable for the processes that are started meanwhile."""
    former = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if former is None:
            del os.environ[name]
        else:
            os.environ[name] = former

"""Server process from which loader workers are forked."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, get_context, resource_tracker
from multiprocessing.context import ForkServerContext

from metaformer.files import check_temporary_folder
from metaformer.signals import blocked_in_children

KILL_WITH_PARENT = "metaformer.data.load.server_end"  # must be imported first
# Modules that workers need or import with train.py. timm and torch's compiler would take 140 MB and seconds more.
PRELOAD = (
    "metaformer.data.load.pil_reader",
    "metaformer.data.load.torch_reader",
    "metaformer.data.load.worker_loader",
    "metaformer.composing",
)


def worker_context() -> ForkServerContext:
    """Return the context that forks workers from a single-threaded server.

    A worker forked from the training process would inherit, and keep for its lifetime, whatever other threads hold at
    that moment: a lock, or the pipe through which wandb learns that its program has started.
    """
    return get_context("forkserver")


def start_worker_server() -> None:
    """Start the server if it is not running yet. It imports the workers' modules in the background."""
    check_temporary_folder()
    # Python's tracker removes the semaphores of a killed rank, and would print a warning about them.
    with _environment("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning"), blocked_in_children():
        # Starting the tracker unblocks signals, so it comes first and they are blocked again below.
        resource_tracker.ensure_running()
    # Otherwise NumPy starts a thread per core when the server imports it.
    with _environment("OPENBLAS_NUM_THREADS", "1"), blocked_in_children():
        forkserver.set_forkserver_preload([KILL_WITH_PARENT, *PRELOAD])
        forkserver.ensure_running()


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for processes started within the block."""
    previous = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if previous is None:
            del os.environ[name]
        else:
            os.environ[name] = previous

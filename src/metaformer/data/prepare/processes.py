"""Processes that share out work which no one waits for but the user: preparing and scanning."""

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context

from metaformer.errors import UserError

Report = Callable[[str, int, int], None]  # what is being done, how much of it is done, of how much


@contextmanager
def worker_processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """A pool whose tasks end with the block, also where it is left by an error or Ctrl-C.

    Raises:
        UserError: a process died.
    """
    context = get_context("spawn")  # a fork copies locks that the progress bar's thread may hold
    with ProcessPoolExecutor(count, mp_context=context, initializer=_prepare_worker) as pool:
        try:
            yield pool
        except BrokenProcessPool as error:
            raise UserError("a worker process died, as for lack of memory; give fewer --workers") from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _prepare_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes; the first one ends the others

"""Process pool for offline jobs: preparing and scanning data sets."""

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context

from metaformer.errors import UserError

ProgressCallback = Callable[[str, int, int], None]  # description of the work, amount done, total amount


@contextmanager
def worker_processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """Provide a pool whose tasks end with the block, even if it is left by an error or Ctrl-C."""
    context = get_context("spawn")  # a fork would copy locks that the progress bar's thread may hold
    with ProcessPoolExecutor(count, mp_context=context, initializer=_prepare_worker) as pool:
        try:
            yield pool
        except BrokenProcessPool as error:
            raise UserError("a worker process died, possibly out of memory; use fewer --workers") from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _prepare_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the main process ends the workers

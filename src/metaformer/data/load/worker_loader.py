"""Loader that reads images one by one in worker processes (`loader=torch`, `loader=pil`)."""

import math
import multiprocessing
import os
import signal
import sys
import time
import weakref
from collections.abc import Iterator
from multiprocessing import queues
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from metaformer.data.index.image_index import ImageIndex
from metaformer.data.load.bad_file import BAD_FILE, describe_bad_file
from metaformer.data.load.image_bytes import ImageBytes
from metaformer.data.load.image_file import is_decoded
from metaformer.data.load.reader import ImageReader
from metaformer.data.load.shared_index import SharedIndex
from metaformer.data.load.worker_server import start_worker_server, worker_context
from metaformer.data.plan.plan import Plan
from metaformer.death_signal import set_parent_death_signal
from metaformer.errors import UserError
from metaformer.interfaces import Waiting


class WorkerLost(UserError):
    """Error for a worker process that ended unexpectedly; not a user error, because the run can be repeated."""

    exit_code = 1


class WorkerLoader:
    """A `Loader` based on torch's DataLoader; each worker makes whole batches, delivered in the plan's order.

    Workers live as long as the loader. They receive (epoch, position) for each batch to make.

    Args:
        reader: makes an image of a batch from the stored one.
        workers: number of worker processes; 0 reads in this process.
        prefetch_batches: number of batches that each worker prepares in advance.
        pin_memory: put batches in page-locked memory for fast copies to a GPU.
    """

    def __init__(
        self,
        reader: ImageReader[Any],
        index: ImageIndex,
        plan: Plan,
        workers: int,
        prefetch_batches: int,
        pin_memory: bool,
    ) -> None:
        if workers:
            start_worker_server()
        self.waited = Waiting()
        self._positions = _Positions(plan.batches_per_epoch)
        self._batches = _Batches(reader, SharedIndex(index), plan)
        self._loader: DataLoader[_Made | str] = DataLoader(
            self._batches,
            batch_size=None,
            sampler=self._positions,
            num_workers=workers,
            prefetch_factor=prefetch_batches if workers else None,
            persistent_workers=workers > 0,
            pin_memory=pin_memory,
            multiprocessing_context=worker_context() if workers else None,
            worker_init_fn=_prepare_worker,
        )
        # Workers do not end on SIGTERM, so Python would wait for them forever at exit.
        self._stop_workers = weakref.finalize(self, _stop_workers, self._loader)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Tensor]:
        """Yield the epoch's batches from number `first` on, as uint8 [B, 3, S, S], and keep the wait for each."""
        self._positions.epoch, self._positions.first = epoch, first
        batches = iter(self._loader)
        while True:
            started = time.monotonic()
            try:
                made = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if not str(error).startswith("DataLoader worker"):
                    raise
                raise WorkerLost(self._describe_loss()) from error
            if isinstance(made, str):
                raise UserError(made)
            self.waited = made.waited(started, time.monotonic())
            yield made.images

    def _describe_loss(self) -> str:
        workers = getattr(self._loader._iterator, "_workers", ())  # DataLoader reports them only in its error message
        failed = [worker for worker in workers if worker.exitcode not in (None, 0)]
        which = ", ".join(f"{worker.pid} ({_describe_exit(worker.exitcode)})" for worker in failed) or "unknown"
        return f"workers={self._loader.num_workers}: a loader worker process has ended: {which}; use fewer workers"

    def close(self) -> None:
        self._stop_workers()
        self._batches.stored.close()


class _Positions(Sampler[tuple[int, int]]):
    def __init__(self, batches_per_epoch: int) -> None:
        self.epoch, self.first = 0, 0
        self._batches_per_epoch = batches_per_epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter([(self.epoch, position) for position in range(self.first, self._batches_per_epoch)])

    def __len__(self) -> int:
        return self._batches_per_epoch - self.first


class _Made(NamedTuple):
    """A batch with the seconds of each stage and the monotonic time at which it was complete."""

    images: Tensor
    read: float
    decode: float
    augment: float
    completed: float

    def waited(self, started: float, received: float) -> Waiting:
        """Divide a wait: the part after completion of the batch is copying; the stages share the rest in proportion."""
        copy = min(received - started, received - self.completed)
        share = (received - started - copy) / (self.read + self.decode + self.augment)
        return Waiting(share * self.read, share * self.decode, share * self.augment, copy)


class _Batches(Dataset[_Made | str]):
    def __init__(self, reader: ImageReader[Any], index: SharedIndex, plan: Plan) -> None:
        self._reader, self._index, self._plan = reader, index, plan
        self.stored = ImageBytes(index.index)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Batches, (self._reader, self._index, self._plan)

    def __getitem__(self, epoch_and_position: tuple[int, int]) -> _Made | str:
        """Return a batch, or the message about a bad file: an exception would lose its type when it leaves a worker."""
        plan = self._plan.to_read(*epoch_and_position)
        images = _allocate((len(plan), plan.image_size, plan.image_size, 3))
        read = decode = augment = 0.0
        completed = time.monotonic()
        self.stored.read_ahead(plan)
        for row, sample in enumerate(plan.samples.tolist()):
            started = completed
            try:
                stored = self.stored.read(sample)
                opened = time.monotonic()
                region = self._reader.decode(stored, plan, row)
                decoded = time.monotonic()
                images[row] = self._reader.augment(region, plan, row)
                completed = time.monotonic()
            except BAD_FILE as error:
                return describe_bad_file(self._index.index.location(sample), error)
            if is_decoded(stored):  # pixels are memory-mapped, so they are read from the disk when they are cut out
                opened = decoded
            read, decode, augment = read + opened - started, decode + decoded - opened, augment + completed - decoded
        return _Made(images, read, decode, augment, completed)


def _allocate(shape: tuple[int, ...]) -> Tensor:
    """Return an uninitialised batch with the given shape [B, S, S, 3], uint8, as a view [B, 3, S, S].

    In a worker it is in shared memory from the start, so that sending it to the training process copies nothing.
    """
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8).permute(0, 3, 1, 2)
    try:
        storage = torch.UntypedStorage._new_shared(math.prod(shape))  # as torch's own collate function does
    except (OSError, RuntimeError) as error:
        _exit_after_send_error(error, None)
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape).permute(0, 3, 1, 2)


def _describe_exit(exit_code: int) -> str:
    if exit_code >= 0:
        return f"exit code {exit_code}"
    name = signal.Signals(-exit_code).name
    return f"killed by {name}, probably out of memory" if name == "SIGKILL" else f"killed by {name}"


def _stop_workers(loader: DataLoader[_Made | str]) -> None:
    iterator: Any = loader._iterator  # DataLoader has no public way to stop persistent workers
    if iterator is not None and loader.num_workers:
        iterator._shutdown_workers()
        loader._iterator = None


def _prepare_worker(worker: int) -> None:
    # The server is killed with the training process, and the workers (even stopped ones) with the server. DataLoader's
    # own check is not enough: it only detects the death of the server, which itself lives as long as its workers.
    set_parent_death_signal(signal.SIGKILL)
    trainer = multiprocessing.parent_process()
    if trainer is not None and not trainer.is_alive():  # both ended before this worker asked for the signal
        os._exit(1)
    torch.set_num_threads(1)
    # By default the sending thread drops a batch that it cannot send, and the training process waits for it forever.
    queues.Queue._on_queue_feeder_error = staticmethod(_exit_after_send_error)  # type: ignore[attr-defined]


def _exit_after_send_error(error: Exception, batch: object) -> NoReturn:
    print(f"error: a loader worker cannot send a batch: {error}", file=sys.stderr, flush=True)
    os._exit(1)

"""Determines by trial which batches fit in a rank's memory."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from metaformer.interfaces import Batch
from metaformer.training.step import Learner, train_step

USABLE = 0.95  # share of a GPU's memory that a trial step may take; the rest allows for variation between steps


def fits(learner: Learner, batch: Batch, images: int) -> bool:
    """Take an optimizer step on batches of `images` images, which changes the state; return whether it fits in memory.

    Ranks can call this independently if the learner's network is not wrapped by DDP.

    Args:
        batch: Images and targets to repeat.
    """
    device = batch.images.device
    try:
        with _limited_memory(device):
            train_step(learner, itertools.repeat(_resized(batch, images)), measure_norm=True)
    except torch.OutOfMemoryError:
        return False
    finally:
        learner.state.optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return True


def largest_that_fits(fits: Callable[[int], bool], first: int, multiple: int, limit: int) -> int:
    """Return a number of images that fits, within an eighth of the largest one; 0 if not even `multiple` images fit.

    Args:
        fits: Returns whether a number of images fits.
        first: The number to begin with, which is doubled while it fits, or halved until it does.
        multiple: The result is a multiple of this.
        limit: The result is at most this.
    """
    low, high = 0, max(multiple, first // multiple * multiple)
    while high <= limit and fits(high):
        low, high = high, 2 * high
    if high > limit:
        return low
    while low == 0:
        middle = high // 2 // multiple * multiple
        if middle == 0:
            return 0
        low, high = (middle, high) if fits(middle) else (0, middle)
    while high - low > max(multiple, low // 8):
        middle = (low + high) // 2 // multiple * multiple
        if middle == low:
            break
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@contextmanager
def _limited_memory(device: torch.device) -> Iterator[None]:
    """Limit this process to `USABLE` of the memory of its GPU."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_per_process_memory_fraction(USABLE, device)
    try:
        yield
        torch.cuda.synchronize(device)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def _resized(batch: Batch, images: int) -> Batch:
    """Return a batch of `images` images in the same memory format, repeating those of `batch`."""
    chosen = torch.arange(images, device=batch.images.device) % len(batch.images)
    last = batch.images.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if last else torch.contiguous_format
    return Batch(batch.images[chosen].contiguous(memory_format=memory_format), batch.targets[chosen])

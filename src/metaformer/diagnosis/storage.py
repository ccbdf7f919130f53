"""Check of the speed at which images of a data set are read from storage."""

import errno
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from metaformer.diagnosis.finding import Finding, fail, ok, warn


class ByteRange(NamedTuple):
    """The bytes of one image: a whole file or a part of a shard."""

    file: Path
    offset: int
    size: int


def read_speed(images: Sequence[ByteRange], threads: int, required: float | None) -> Iterator[Finding]:
    """Measure how fast threads read images, each once, after asking the kernel to drop them from its page cache.

    Args:
        images: the images to read.
        threads: number of threads.
        required: images per second that this node's GPUs consume; None if unknown.
    """
    try:
        for image in images:
            _drop_from_cache(image)
        start = time.monotonic()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(_read, images))
        seconds = time.monotonic() - start
    except OSError as error:
        yield fail("reading", f"{error.filename}: cannot be read ({error.strerror})", "repair or quarantine the file")
        return
    speed, megabytes = len(images) / seconds, sum(image.size for image in images) / 1e6
    message = f"{speed:,.0f} images/s, {megabytes / seconds:,.0f} MB/s with {threads} threads over {len(images)} images"
    if required is not None and speed < required:
        fix = "copy the data to a local disk, or spread it over more servers"
        yield warn("reading", f"{message}; {required:g} images/s are required", fix)
    else:
        yield ok("reading", message)


def _drop_from_cache(image: ByteRange) -> None:
    """Ask the kernel to drop the range from its page cache; network file systems may ignore this."""
    descriptor = os.open(image.file, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, image.offset, image.size, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _read(image: ByteRange) -> None:
    """Read one range.

    Raises:
        OSError: the range cannot be read, or the file ends before it.
    """
    with image.file.open("rb", buffering=0) as file:
        file.seek(image.offset)
        left = image.size
        while left:
            count = len(file.read(left))
            if not count:
                raise OSError(errno.EIO, f"ends {left} bytes early", str(image.file))
            left -= count

"""How fast the storage delivers the data set's images."""

import errno
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from metaformer.diagnosis.finding import Finding, fail, ok, warn


class ByteRange(NamedTuple):
    """The bytes of one image: a whole file, or a part of a shard."""

    file: Path
    offset: int
    size: int


def reading(images: Sequence[ByteRange], threads: int, needed: float | None) -> Iterator[Finding]:
    """Read images in threads, each once, from the disk where the kernel drops what it has cached of them.

    Args:
        needed: images a second that this node's GPUs consume; None: not known.
    """
    try:
        for image in images:
            _forget(image)
        start = time.monotonic()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(_read, images))
        took = time.monotonic() - start
    except OSError as error:
        yield fail("reading", f"{error.filename}: cannot be read ({error.strerror})", "mend or quarantine the file")
        return
    speed, megabytes = len(images) / took, sum(image.size for image in images) / 1e6
    said = f"{speed:,.0f} images/s, {megabytes / took:,.0f} MB/s with {threads} threads over {len(images)} images"
    if needed is not None and speed < needed:
        mend = "copy the data to a local disk, or spread it over more servers"
        yield warn("reading", f"{said}; {needed:g} images/s are asked for", mend)
    else:
        yield ok("reading", said)


def _forget(image: ByteRange) -> None:
    """Ask the kernel to drop the range from its cache; a hint, which network file systems may ignore."""
    descriptor = os.open(image.file, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, image.offset, image.size, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _read(image: ByteRange) -> None:
    """Read one range.

    Raises:
        OSError: it cannot be read, or the file is shorter.
    """
    with image.file.open("rb", buffering=0) as file:
        file.seek(image.offset)
        left = image.size
        while left:
            count = len(file.read(left))
            if not count:
                raise OSError(errno.EIO, f"ends {left} bytes early", str(image.file))
            left -= count

"""How fast the data set's files come."""

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from metaformer.diagnosis.finding import Finding, fail, ok, warn


def reading(files: Sequence[Path], threads: int, needed: float | None) -> Iterator[Finding]:
    """Read files at once in threads, each once, from the disk where the kernel lets go of what it has cached of them.

    Args:
        needed: images a second that this node's GPUs ask for; None: not known.
    """
    try:
        for file in files:
            _forget(file)
        start = time.monotonic()
        with ThreadPoolExecutor(threads) as pool:
            sizes = list(pool.map(_read, files))
        took = time.monotonic() - start
    except OSError as error:
        yield fail("reading", f"{error.filename}: cannot be read ({error.strerror})", "mend or quarantine the file")
        return
    speed = len(files) / took
    said = f"{speed:,.0f} files/s, {sum(sizes) / took / 1e6:,.0f} MB/s with {threads} threads over {len(files)} files"
    if needed is not None and speed < needed:
        mend = "copy the data to a local disk, or spread it over more servers"
        yield warn("reading", f"{said}; {needed:g} images/s are asked for", mend)
    else:
        yield ok("reading", said)


def _forget(file: Path) -> None:
    """Ask the kernel to drop the file from its cache; a hint, which network file systems may not take."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _read(file: Path) -> int:
    return len(file.read_bytes())

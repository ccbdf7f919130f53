"""Memory maps of files of decoded pixels."""

import mmap
import os
from pathlib import Path
from threading import Lock

import numpy as np

from metaformer.data.index.shards import Pixels, Shards
from metaformer.data.load.bad_file import DamagedShard
from metaformer.data.load.image_file import PixelArray

CHANGED = "the file has changed since it was indexed; start again, and do not modify data during a run"


class PixelMaps:
    """Thread-safe access to decoded images; each file is mapped once, on first use.

    The size and time of a file are compared with the index at each access, because reading a map past the end of its
    file would kill the process.
    """

    def __init__(self, folder: Path, shards: Shards, pixels: Pixels) -> None:
        self._folder, self._shards, self._pixels = folder, shards, pixels
        self._lock = Lock()
        self._open: dict[int, tuple[int, mmap.mmap]] = {}  # descriptor and map by number of the file

    def read(self, sample: int) -> PixelArray:
        """Return an image as a read-only view of the map, of which nothing is read until it is used.

        Raises:
            OSError: the file cannot be opened, or has changed.
        """
        number = int(self._shards.numbers[sample])
        descriptor, mapped = self._map(number)
        status = os.fstat(descriptor)
        if (status.st_size, status.st_mtime_ns) != self._pixels.states[number]:
            raise DamagedShard(CHANGED)
        height, width = self._pixels.shapes[sample].tolist()
        return np.ndarray((height, width, 3), np.uint8, mapped, int(self._shards.offsets[sample]))

    def close(self) -> None:
        """Close the files. A map stays while images refer to it."""
        while self._open:
            descriptor, _ = self._open.popitem()[1]
            os.close(descriptor)

    def _map(self, number: int) -> tuple[int, mmap.mmap]:
        with self._lock:
            if number not in self._open:
                descriptor = os.open(self._folder / self._shards.names[number], os.O_RDONLY | os.O_CLOEXEC)
                try:
                    size, _ = self._pixels.states[number]
                    if os.fstat(descriptor).st_size != size:
                        raise DamagedShard(CHANGED)
                    self._open[number] = descriptor, mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
                except BaseException:
                    os.close(descriptor)
                    raise
            return self._open[number]

"""Random access to the images of an index, stored as files, as byte ranges of shards, or as pixels."""

import os
import resource
import stat
import weakref
import zlib
from contextlib import suppress
from threading import Lock
from typing import Any

import numpy as np

from metaformer.data.index.image_index import ImageIndex
from metaformer.data.index.shards import NO_CHECKSUM
from metaformer.data.load.bad_file import DamagedShard
from metaformer.data.load.image_file import Encoded, StoredImage, read_ahead
from metaformer.data.load.pixel_maps import PixelMaps
from metaformer.data.plan.plan import BatchPlan
from metaformer.errors import UserError

OTHER_FILES = 256  # open files that a process may need besides the shards


class ImageBytes:
    """Thread-safe reader of the images of an index.

    A process opens each shard once, on first use, and keeps it open. An unpickled copy opens the shards itself.
    It is an error if there are more shards than the process may have open files.
    """

    def __init__(self, index: ImageIndex) -> None:
        self._index = index
        self._prefix = os.fsencode(index.folder) + b"/"
        self._lock = Lock()
        self._descriptors: dict[int, int] = {}
        self._maps: PixelMaps | None = None
        if index.shards is not None:
            _allow_open_files(len(index.shards.names) + OTHER_FILES)
            if index.shards.pixels is not None:
                self._maps = PixelMaps(index.folder, index.shards, index.shards.pixels)
        self.close = weakref.finalize(self, _close, self._descriptors, self._maps)

    def __reduce__(self) -> tuple[Any, ...]:
        return ImageBytes, (self._index,)

    def read(self, sample: int) -> StoredImage:
        """Return the encoded bytes of an image, or a view of its pixels if it is stored decoded.

        Raises:
            OSError: the image cannot be read.
        """
        if self._maps is not None:
            return self._maps.read(sample)
        shards = self._index.shards
        if shards is None:
            return read_file(self._prefix + self._index.paths[sample].tobytes().rstrip(b"\0"))
        encoded = np.empty(int(self._index.sizes[sample]), np.uint8)
        descriptor, offset = self._descriptor(int(shards.numbers[sample])), int(shards.offsets[sample])
        return _read(descriptor, offset, encoded, "the shard ends before the image")

    def read_ahead(self, plan: BatchPlan) -> None:
        """Make the kernel start to read the regions that a batch needs of images stored as pixels; return at once.

        The disk then works on the next images while the first ones are resized. Images that cannot be read are left
        out, because `read` reports them.
        """
        if self._maps is None:
            return
        for row, sample in enumerate(plan.samples.tolist()):
            with suppress(OSError):
                pixels = self._maps.read(sample)
                height, width, _ = pixels.shape
                read_ahead(pixels, plan.region(row, width, height))

    def check(self, sample: int) -> StoredImage:
        """Return an image as `read` does, after comparing it with its checksum if it has one.

        Raises:
            OSError: the image cannot be read, or has changed.
        """
        image, shards = self.read(sample), self._index.shards
        if shards is not None and int(shards.checksums[sample]) not in (NO_CHECKSUM, zlib.crc32(image.data)):
            what = "bytes" if shards.pixels is None else "pixels"
            raise DamagedShard(f"its {what} have changed (they do not have their CRC-32); copy the file again, or "
                               "prepare the data again")  # fmt: skip
        return image

    def _descriptor(self, shard: int) -> int:
        with self._lock:
            if shard not in self._descriptors:
                assert self._index.shards is not None
                file = self._index.folder / self._index.shards.names[shard]
                self._descriptors[shard] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            return self._descriptors[shard]


def read_file(path: bytes) -> Encoded:
    """Return the content of a regular file.

    Raises:
        OSError: it cannot be read, or is a folder, FIFO or device.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO without a writer would block
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("not a regular file")
        return _read(descriptor, 0, np.empty(status.st_size, np.uint8), "the file is shorter than its size")
    finally:
        os.close(descriptor)


def _read(descriptor: int, offset: int, content: Encoded, truncated_message: str) -> Encoded:
    """Fill `content` from `offset` on, or raise an OSError with the given message if the data ends too early."""
    done = 0
    while done < len(content):
        count = os.preadv(descriptor, [content[done:].data], offset + done)
        if not count:
            raise OSError(truncated_message)
        done += count
    return content


def _close(descriptors: dict[int, int], maps: PixelMaps | None) -> None:
    if maps is not None:
        maps.close()
    while descriptors:
        os.close(descriptors.popitem()[1])


def _allow_open_files(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        if hard < count:
            raise UserError(f"data.root: its shards need {count} open files, but only {hard} are allowed; raise "
                            "`ulimit -n`, or pack larger shards (--shard-size)")  # fmt: skip
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))

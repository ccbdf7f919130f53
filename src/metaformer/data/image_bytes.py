"""The encoded images of an index by random access: each a file, or a range of a shard that stays open."""

import os
import resource
import weakref
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metaformer.data.index import ImageIndex
from metaformer.errors import UserError

Encoded = NDArray[np.uint8]  # [bytes]
OTHER_FILES = 256  # that a process has open beside shards


class ImageBytes:
    """Reads images of an index, in any number of threads.

    A process opens a shard once, when it first needs it; a pickle of this opens its own.

    Raises:
        UserError: the process may not have as many files open as there are shards.
    """

    def __init__(self, index: ImageIndex) -> None:
        self._index = index
        self._lock = Lock()
        self._descriptors: dict[int, int] = {}
        if index.shards is not None:
            _allow_open_files(len(index.shards.names) + OTHER_FILES)
        self.close = weakref.finalize(self, _close, self._descriptors)

    def __reduce__(self) -> tuple[Any, ...]:
        return ImageBytes, (self._index,)

    def read(self, sample: int) -> Encoded:
        """The bytes of one image's file.

        Raises:
            OSError: it cannot be read.
        """
        shards = self._index.shards
        if shards is None:
            return np.fromfile(self._index.path(sample), np.uint8)
        encoded = np.empty(int(self._index.sizes[sample]), np.uint8)
        descriptor, offset, done = self._descriptor(int(shards.numbers[sample])), int(shards.offsets[sample]), 0
        while done < len(encoded):
            count = os.preadv(descriptor, [encoded[done:].data], offset + done)
            if not count:
                raise OSError("the shard ends before it")
            done += count
        return encoded

    def _descriptor(self, shard: int) -> int:
        with self._lock:
            if shard not in self._descriptors:
                assert self._index.shards is not None
                file = self._index.folder / self._index.shards.names[shard]
                self._descriptors[shard] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            return self._descriptors[shard]


def _close(descriptors: dict[int, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])


def _allow_open_files(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        if hard < count:
            raise UserError(f"data.root: its shards need {count} open files, {hard} are allowed; raise `ulimit -n`, or "
                            "pack larger shards (--shard-size)")  # fmt: skip
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))

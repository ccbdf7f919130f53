"""Image index shared with worker processes, which map its arrays instead of receiving a copy."""

import mmap
import os
import weakref
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metaformer.data.index.image_index import ImageIndex

EMPTY: Any = np.empty(0, np.int64)


class SharedIndex:
    """Wrapper that pickles an index by reference into processes being started; their copy maps the same memory.

    The files of a cached scan stay open here, because a later scan may remove them before all workers have started.
    Arrays without a file (of a quarantined index, for instance) are copied into an anonymous file.
    """

    def __init__(self, index: ImageIndex) -> None:
        self.index = index
        self._image_arrays: tuple[_Array, ...] = ()
        self._shard_arrays: tuple[_Array, ...] = ()

    def __reduce__(self) -> tuple[Callable[..., "SharedIndex"], tuple[Any, ...]]:
        index, shards = self.index, self.index.shards
        if not self._image_arrays:
            self._image_arrays = tuple(_Array(each) for each in (index.paths, index.labels, index.sizes))
            self._shard_arrays = tuple(_Array(each) for each in shards.arrays) if shards else ()
        if shards is not None:
            shards = shards.with_arrays(*(EMPTY for _ in shards.arrays))
        empty = replace(index, paths=EMPTY, labels=EMPTY, sizes=EMPTY, shards=shards)
        return _restore, (empty, self._image_arrays, self._shard_arrays)


class _Array:
    """An array backed by a file descriptor, pickled as an array that maps the same file."""

    def __init__(self, array: NDArray[Any]) -> None:
        self._dtype, self._shape = array.dtype, array.shape
        self._descriptor: int
        self._offset = 0
        if isinstance(array, np.memmap) and isinstance(array.base, mmap.mmap):  # a whole file, not a slice
            self._offset = array.offset
            self._descriptor = os.open(str(array.filename), os.O_RDONLY)
        else:
            self._descriptor = os.memfd_create("metaformer-index")
            with os.fdopen(os.dup(self._descriptor), "wb") as file:
                file.write(np.ascontiguousarray(array).data)
        weakref.finalize(self, os.close, self._descriptor)

    def __reduce__(self) -> tuple[Callable[..., NDArray[Any]], tuple[Any, ...]]:
        return _map, (DupFd(self._descriptor), self._dtype, self._shape, self._offset)


def _restore(empty: ImageIndex, image_arrays: tuple[Any, ...], shard_arrays: tuple[Any, ...]) -> SharedIndex:
    paths, labels, sizes = image_arrays
    shards = empty.shards and empty.shards.with_arrays(*shard_arrays)
    return SharedIndex(replace(empty, paths=paths, labels=labels, sizes=sizes, shards=shards))


def _map(descriptor: Any, dtype: np.dtype[Any], shape: tuple[int, ...], offset: int) -> NDArray[Any]:
    with os.fdopen(descriptor.detach(), "rb") as file:
        return np.memmap(file, dtype, "r", offset, shape)

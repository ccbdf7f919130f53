"""An index that worker processes share: they map its arrays instead of receiving a copy."""

import mmap
import os
import weakref
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metaformer.data.index import ImageIndex

NOTHING = np.empty(0, np.int64)


class SharedIndex:
    """Pickles by reference, into processes that are being started; their copy maps the same memory.

    The files of a kept scan stay open here: a later scan may remove them while workers are still to be started.
    Arrays without a file (of a quarantined index, for instance) are copied into an anonymous one.
    """

    def __init__(self, index: ImageIndex) -> None:
        self.index = index
        self._arrays: dict[str, _Array] = {}

    def __reduce__(self) -> tuple[Callable[..., "SharedIndex"], tuple[Any, ...]]:
        if not self._arrays:
            self._arrays = {name: _Array(array) for name, array in _arrays(self.index).items()}
        empty = replace(self.index, paths=NOTHING, labels=NOTHING, sizes=NOTHING)
        if empty.shards is not None:
            empty = replace(empty, shards=empty.shards._replace(numbers=NOTHING, offsets=NOTHING))
        return _restore, (empty, self._arrays)


class _Array:
    """An array behind a file descriptor."""

    def __init__(self, array: NDArray[Any]) -> None:
        self._dtype, self._shape, self._offset = array.dtype, array.shape, 0
        if isinstance(array, np.memmap) and isinstance(array.base, mmap.mmap):  # the whole of it, not a part
            self._descriptor = os.open(str(array.filename), os.O_RDONLY)
            self._offset = array.offset
        else:
            self._descriptor = os.memfd_create("metaformer-index")
            with os.fdopen(os.dup(self._descriptor), "wb") as file:
                file.write(np.ascontiguousarray(array).data)
        weakref.finalize(self, os.close, self._descriptor)

    def __reduce__(self) -> tuple[Callable[..., NDArray[Any]], tuple[Any, ...]]:
        return _map, (DupFd(self._descriptor), self._dtype, self._shape, self._offset)


def _arrays(index: ImageIndex) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = {"paths": index.paths, "labels": index.labels, "sizes": index.sizes}
    if index.shards is not None:
        arrays |= {"numbers": index.shards.numbers, "offsets": index.shards.offsets}
    return arrays


def _restore(empty: ImageIndex, arrays: dict[str, NDArray[Any]]) -> SharedIndex:
    of_shards = {name: arrays.pop(name) for name in ("numbers", "offsets") if name in arrays}
    shards = empty.shards and empty.shards._replace(**of_shards)
    return SharedIndex(replace(empty, **arrays, shards=shards))


def _map(descriptor: Any, dtype: np.dtype[Any], shape: tuple[int, ...], offset: int) -> NDArray[Any]:
    with os.fdopen(descriptor.detach(), "rb") as file:
        return np.memmap(file, dtype, "r", offset, shape)

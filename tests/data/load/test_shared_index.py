"""Tests of an index shared with worker processes: equal, memory-mapped arrays, even if the cache files are removed."""

import mmap
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from metaformer.data.index.image_index import ImageIndex, load_index
from metaformer.data.load.shared_index import SharedIndex
from metaformer.data.load.worker_server import start_worker_server, worker_context


def arrays_of(index: ImageIndex) -> list[NDArray[Any]]:
    """Return all arrays of an index."""
    return [index.paths, index.labels, index.sizes, *(index.shards.arrays if index.shards else ())]


def describe(shared: SharedIndex, results: Any) -> None:
    """Send, from a worker, the contents of the index and whether all arrays are mapped."""
    index = shared.index
    mapped = all(isinstance(array.base, mmap.mmap) for array in arrays_of(index))
    results.put((*contents(index), mapped))


def contents(index: ImageIndex) -> tuple[Any, ...]:
    """Return everything that a worker uses of an index."""
    states = index.shards.pixels.states if index.shards and index.shards.pixels else ()
    return index.fingerprint, index.classes, [array.tolist() for array in arrays_of(index)], index.location(1), states


def in_worker(shared: SharedIndex) -> Any:
    """Start a worker and return what it sends."""
    start_worker_server()
    results = worker_context().Queue()
    worker = worker_context().Process(target=describe, args=(shared, results))
    worker.start()
    result = results.get(timeout=60)
    worker.join()
    return result


@pytest.mark.parametrize("kind", ["files", "shards", "pixels"])
@pytest.mark.parametrize("part", ["all", "selected"])
def test_a_worker_maps_the_same_index(own_root: Path, own_shards: Path, own_pixels: Path, kind: str, part: str) -> None:
    """Every array is equal and mapped, both for a cached scan and for a selection, which has no file."""
    index = load_index({"files": own_root, "shards": own_shards, "pixels": own_pixels}[kind], "train")
    if part == "selected":
        index = index.select(np.array([3, 1, 2]))
    assert in_worker(SharedIndex(index)) == (*contents(index), True)


def test_a_worker_started_after_the_cache_was_removed(own_root: Path) -> None:
    """Workers for validation may start hours later, when another program has replaced the cached scan."""
    index = load_index(own_root, "train")
    shared = SharedIndex(index)
    assert in_worker(shared) == (*contents(index), True)
    shutil.rmtree(own_root / ".metaformer")
    assert in_worker(shared) == (*contents(index), True)

"""Helpers that run a function on several local ranks, joined by gloo, and that mount and fill a small disk."""

import os
import pickle
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from metaformer.runtime import Runtime, start
from tests.fork_server import context

TIMEOUT_SECONDS = 60.0  # after which ranks count as hanging
Work = Callable[[Runtime], Any]


def on_ranks(work: Work, world_size: int = 2) -> list[Any]:
    """Run a module-level function on each rank, and return its results or the errors that it raised."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    results = context.Queue()
    ranks = [context.Process(target=_run, args=(work, rank, world_size, port, results)) for rank in range(world_size)]
    for process in ranks:
        process.start()
    try:
        found = dict(pickle.loads(results.get(timeout=TIMEOUT_SECONDS)) for _ in ranks)
        for process in ranks:
            process.join(TIMEOUT_SECONDS)
            assert process.exitcode == 0
    finally:
        for process in ranks:
            process.kill()
    return [found[rank] for rank in range(world_size)]


def _run(work: Work, rank: int, world_size: int, port: int, results: Any) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world_size}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    with start() as runtime:
        try:
            result = work(runtime)
        except Exception as error:  # returned to the test, which checks it
            result = error
        # As bytes: torch would pass a tensor as a file descriptor, which is gone if this rank ends first.
        results.put(pickle.dumps((rank, result)))


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Mount a tmpfs of a size such as "64k", or skip the test if that is not possible.

    It is unmounted even if a failing test still has a file open on it.
    """
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system of a given size can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Fill a disk, and return the file that takes up the space."""
    file = disk / "filler"
    with file.open("wb", buffering=0) as filler:
        try:
            while filler.write(b"\0" * 4096):
                pass
        except OSError:
            return file
    raise AssertionError("the disk does not fill up")

"""Files that appear whole or not at all, also when the machine dies while they are written."""

import glob
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path


def fsync(path: Path) -> None:
    """Force a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_beside(path: Path) -> Path:
    """Return a hidden name beside `path` that no other process uses, on this machine or another."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def remove_temporaries(path: Path) -> None:
    """Remove what `temporary_beside` has named for `path`, in killed processes too, once `path` is there."""
    for left_over in path.parent.glob(f".{glob.escape(path.name)}.????????.tmp"):
        if left_over.is_dir():
            shutil.rmtree(left_over, ignore_errors=True)
        else:
            left_over.unlink(missing_ok=True)


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it there in one step, replacing what was there.

    Raises:
        OSError: the folder cannot be written; `path` is then as it was.
    """
    temporary = temporary_beside(path)
    try:
        write(temporary)
        fsync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync(path.parent)


def write_text_whole(path: Path, text: str) -> None:
    """`write_whole` of a text.

    Raises:
        OSError: as there.
    """

    def write(temporary: Path) -> None:
        temporary.write_text(text)

    write_whole(path, write)

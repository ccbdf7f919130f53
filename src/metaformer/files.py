"""Files that appear whole or not at all, also when the machine dies while they are written, and JSON."""

import glob
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


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


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON of plain values; a NaN or an infinity, which JSON does not have, becomes null."""
    return json.dumps(null_where_not_finite(value), indent=indent, allow_nan=False)


def null_where_not_finite(value: Any) -> Any:
    """A copy of plain values, nested in dicts, lists and tuples, with None in place of each NaN and infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: null_where_not_finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [null_where_not_finite(item) for item in value]
    return value

"""Files that appear whole or not at all, also when the machine dies while they are written, and JSON."""

import json
import math
import os
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


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it there in one step, replacing what was there.

    Raises:
        OSError: the folder cannot be written; `path` is then as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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

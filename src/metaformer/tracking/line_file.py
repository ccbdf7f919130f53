"""Appends whole lines to a text file, even if the disk is full at times, and reads files of JSON lines."""

import json
import os
from pathlib import Path
from typing import Any

from metaformer.errors import UserError, warn


class LineFile:
    """A file to which lines are appended.

    Lines that cannot be written are kept, and written before later ones. `write` and `close` raise no errors.

    Raises:
        OSError: The file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        self._end = os.lseek(self._descriptor, 0, os.SEEK_END)  # end of the last whole line
        self._pending: list[str] = []

    def write(self, line: str) -> None:
        """Append a line, given without a line break."""
        self._pending.append(line + "\n")
        content = "".join(self._pending).encode(errors="surrogateescape")
        try:
            written = os.pwrite(self._descriptor, content, self._end)
            if written < len(content):
                os.ftruncate(self._descriptor, self._end)
                return self._warn("the disk is full")
        except OSError as error:
            return self._warn(error.strerror or str(error))
        self._end += written
        self._pending = []

    def close(self) -> None:
        """Close the file, and warn about lines that could not be written."""
        os.close(self._descriptor)
        if self._pending:
            warn(f"{self._path}: {len(self._pending)} lines could not be written")

    def _warn(self, reason: str) -> None:
        if len(self._pending) == 1:
            warn(f"{self._path}: cannot be written ({reason}); training continues, and lines are kept until it can")


def read_objects(path: Path, types: dict[str, type], allow_partial_last_line: bool = False) -> list[dict[str, Any]]:
    """Return the JSON objects in a file with one object per line, or an empty list if there is no file.

    Args:
        types: Fields that each object must have, with their types.
        allow_partial_last_line: Skip the start of a line at the end, which a crash during a write leaves behind.

    Raises:
        OSError: The file cannot be read.
    """
    if not path.exists():
        return []
    objects = []
    content = path.read_bytes()
    lines = content.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            found = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            if allow_partial_last_line and number == len(lines) and not content.endswith(b"\n"):
                break
            raise UserError(f"{path}: line {number} is not JSON; move the file away") from error
        if not isinstance(found, dict) or not all(type(found.get(name)) is kind for name, kind in types.items()):
            expected = ", ".join(types)
            raise UserError(f"{path}: line {number} is damaged: not an object with {expected}; move the file away")
        objects.append(found)
    return objects

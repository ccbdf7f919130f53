"""A text file that grows by whole lines, and that a full disk does not stop; and reading such files of JSON."""

import json
import os
from pathlib import Path
from typing import Any

from metaformer.errors import UserError, warn


class LineFile:
    """Appends lines; those that the disk refuses are kept, and written before the next ones. Nothing is raised.

    Raises:
        OSError: at the beginning, if the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        self._end = os.lseek(self._descriptor, 0, os.SEEK_END)  # of the last whole line
        self._pending: list[str] = []

    def write(self, line: str) -> None:
        """Add a line, without its end."""
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
        """Say what is lost, if something is."""
        os.close(self._descriptor)
        if self._pending:
            _print(f"{self._path}: {len(self._pending)} lines could not be written")

    def _warn(self, reason: str) -> None:
        if len(self._pending) == 1:
            _print(f"{self._path}: cannot be written ({reason}); training goes on, lines are kept until it can")


def read_objects(path: Path, types: dict[str, type], may_end_within: bool = False) -> list[dict[str, Any]]:
    """Return the JSON objects of a file, one a line; none if there is no file.

    Args:
        types: what each object must have.
        may_end_within: leave out a last line that is no JSON: a machine died while it was written.

    Raises:
        UserError: a line is damaged.
        OSError: the file cannot be read.
    """
    if not path.exists():
        return []
    objects = []
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            found = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            if may_end_within and number == len(lines):
                break
            raise UserError(f"{path}: line {number} is not JSON; move the file away") from error
        if not isinstance(found, dict) or not all(type(found.get(name)) is kind for name, kind in types.items()):
            expected = ", ".join(types)
            raise UserError(f"{path}: line {number} is damaged: not an object with {expected}; move the file away")
        objects.append(found)
    return objects


def _print(warning: str) -> None:
    warn(warning)

"""A text file that grows by whole lines, and that a full disk does not stop."""

import os
import sys
from pathlib import Path


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


def _print(warning: str) -> None:
    print(f"warning: {warning}", file=sys.stderr, flush=True)

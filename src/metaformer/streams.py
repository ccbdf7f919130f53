"""stdout and stderr that may fail: the disk below them is full, or the program that reads them is gone.

A run that lasts for days must not end because nobody can read what it prints.
"""

import io
import os
import select
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

STDOUT, STDERR = "stdout", "stderr"


class FailSafeFile(io.FileIO):
    """The file descriptor of a stream, written until that fails; everything after that is dropped.

    Nothing is left in the buffers above it: Python's own flush at exit would turn the exit code into 120.

    Attributes:
        failure: why it cannot be written; None as long as it can.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream.fileno(), "w", closefd=False)
        self.failure: str | None = None
        self._stream = stream  # which would close the descriptor when nobody has it any more

    def write(self, content: Any, /) -> int:
        if self.failure is None:
            try:
                while (written := super().write(content)) is None:  # not blocking, and full
                    select.select([], [self], [])
            except OSError as error:
                self.failure = error.strerror or str(error)
            else:
                return written
        return len(content)


# A process has one stdout and one stderr; these are below them.
_files: dict[str, FailSafeFile] = {}


def guard() -> None:
    """Let whatever is printed from here on, by anyone in this process, raise no error. `failures` tells what is lost.

    Where the starting program has closed one of the first three file descriptors, it leads to /dev/null from here on,
    so that no file of the run gets its number.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdout, sys.stderr = _guarded(STDOUT, sys.stdout), _guarded(STDERR, sys.stderr)


def failures() -> dict[str, str]:
    """The reason for each of stdout and stderr that could not be written."""
    return {name: file.failure for name, file in _files.items() if file.failure is not None}


def _guarded(name: str, stream: TextIO | None) -> TextIO:
    if stream is None:
        return Path(os.devnull).open("w", encoding="utf-8", errors="replace")
    with suppress(OSError):
        stream.flush()
    _files[name] = FailSafeFile(stream)
    errors = "backslashreplace" if stream.errors == "strict" else stream.errors
    # Unbuffered where Python was asked for that (python -u) means at each line here.
    by_line = stream.line_buffering or getattr(stream, "write_through", False)
    return io.TextIOWrapper(io.BufferedWriter(_files[name]), stream.encoding, errors, line_buffering=bool(by_line))

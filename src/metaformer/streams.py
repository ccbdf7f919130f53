"""stdout and stderr that never raise errors, so that a full disk or a closed pipe does not end a long run."""

import io
import os
import select
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

STDOUT, STDERR = "stdout", "stderr"


class FailSafeFile(io.FileIO):
    """The raw file of a stream. After the first failed write, all output is dropped.

    No output stays in the buffers above it, because a failed flush at exit would make Python's exit code 120.

    Attributes:
        failure: Why the stream cannot be written, or None while it can.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream.fileno(), "w", closefd=False)
        self.failure: str | None = None
        self._stream = stream  # keeps a reference: a garbage-collected stream closes its descriptor

    def write(self, content: Any, /) -> int:
        if self.failure is None:
            try:
                while (written := super().write(content)) is None:  # non-blocking and full
                    select.select([], [self], [])
            except OSError as error:
                self.failure = error.strerror or str(error)
            else:
                return written
        return len(content)


# The files below this process's stdout and stderr.
_files: dict[str, FailSafeFile] = {}


def guard() -> None:
    """Replace stdout and stderr of this process by streams that never raise errors; see `failures`.

    If the parent process closed any of the first three file descriptors, they are opened on /dev/null, so that no file
    of the run gets their numbers.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdout, sys.stderr = _guarded(STDOUT, sys.stdout), _guarded(STDERR, sys.stderr)


def failures() -> dict[str, str]:
    """Return the reason for each of stdout and stderr that could not be written."""
    return {name: file.failure for name, file in _files.items() if file.failure is not None}


def _guarded(name: str, stream: TextIO | None) -> TextIO:
    if stream is None:
        return Path(os.devnull).open("w", encoding="utf-8", errors="replace")
    with suppress(OSError):
        stream.flush()
    _files[name] = FailSafeFile(stream)
    errors = "backslashreplace" if stream.errors == "strict" else stream.errors
    # An unbuffered stream (python -u) becomes a line-buffered one.
    by_line = bool(stream.line_buffering or getattr(stream, "write_through", False))
    return io.TextIOWrapper(io.BufferedWriter(_files[name]), stream.encoding, errors, line_buffering=by_line)

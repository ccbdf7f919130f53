"""Atomic file writes, JSON output, and checks of output, cache and temporary folders."""

import glob
import hashlib
import json
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from metaformer.errors import UserError

MAX_TEMPORARY_FOLDER_BYTES = 107 - len("/pymp-XXXXXXXX/listener-XXXXXXXX")


def fsync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def temporary_beside(path: Path) -> Path:
    """Return a hidden path next to `path` that no other process uses, on this or any other machine."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def remove_temporaries(path: Path) -> None:
    """Remove temporary files of `temporary_beside(path)`, also of killed processes. Call it once `path` exists."""
    _remove_all(path.parent, glob.escape(path.name))


def remove_temporaries_in(folder: Path) -> None:
    """Remove all files of `temporary_beside` that killed processes left in a folder, to which nobody may be writing.

    Raises:
        OSError: A leftover file cannot be removed.
    """
    _remove_all(folder, "*")


def _remove_all(folder: Path, name: str) -> None:
    for left_over in folder.glob(f".{name}.{'[0-9a-f]' * 8}.tmp"):
        if left_over.is_dir():
            shutil.rmtree(left_over, ignore_errors=True)
        else:
            left_over.unlink(missing_ok=True)


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` create a temporary file next to `path`, then rename it to `path`, replacing any earlier file.

    `path` is complete or unchanged even if the machine crashes meanwhile.

    Raises:
        OSError: The folder cannot be written; `path` is then unchanged.
    """
    temporary = temporary_beside(path)
    try:
        write(temporary)
        fsync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync(path.parent)


def write_text_atomically(path: Path, text: str) -> None:
    """Write a text with `write_atomically`.

    Raises:
        OSError: The folder cannot be written; `path` is then unchanged.
    """

    def write(temporary: Path) -> None:
        temporary.write_text(text)

    write_atomically(path, write)


def to_json(value: Any, indent: int | None = None) -> str:
    """Return plain values as JSON, with null in place of NaN and infinity, which JSON lacks."""
    return json.dumps(null_where_not_finite(value), indent=indent, allow_nan=False)


def null_where_not_finite(value: Any) -> Any:
    """Return a copy of plain values, nested in dicts, lists and tuples, with None in place of each NaN and infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: null_where_not_finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [null_where_not_finite(item) for item in value]
    return value


def check_output(option: str, file: Path) -> None:
    """Check, before a long computation, that `write_atomically` can write a file. Nothing is changed.

    Args:
        option: The option as the user wrote it, such as "--json=FILE", for the error message.
    """
    try:
        if file.exists() and not file.is_file():
            raise UserError(f"{option}: cannot be written (not a file); give another name")
        probe = temporary_beside(file)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{option}: cannot be written ({error.strerror or error}); give another place") from error


def cache_folder() -> Path:
    """Return the folder for files that can be downloaded or computed again.

    It is $XDG_CACHE_HOME/metaformer or ~/.cache/metaformer. For a user without a home folder, such as an unknown user
    id in a container, it is metaformer-UID in the folder for temporary files.

    It is an error if that last folder belongs to another user.
    """
    cache_home = os.environ.get("XDG_CACHE_HOME")
    if cache_home:
        return Path(cache_home) / "metaformer"
    try:
        return Path.home() / ".cache" / "metaformer"
    except RuntimeError:
        folder = Path(tempfile.gettempdir()) / f"metaformer-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        owned = folder.lstat().st_uid == os.getuid() and not folder.is_symlink()
    except OSError:  # reported when something is written there
        return folder
    if not owned:
        raise UserError(f"{folder}: belongs to another user, and you have no home folder; set XDG_CACHE_HOME")
    return folder


def check_temporary_folder() -> None:
    """Raise an error if the path of the folder for temporary files is too long for the sockets of worker processes.

    The path of a Unix socket has at most 107 bytes; Python's are FOLDER/pymp-XXXXXXXX/listener-XXXXXXXX.
    """
    folder = tempfile.gettempdir()
    if len(os.fsencode(folder)) > MAX_TEMPORARY_FOLDER_BYTES:
        raise UserError(
            f"TMPDIR={folder}: {len(os.fsencode(folder))} bytes long, and worker processes need a path of at most "
            f"{MAX_TEMPORARY_FOLDER_BYTES}; export TMPDIR=/tmp, or use workers=0"
        )

"""Files that appear whole or not at all, also when the machine dies while they are written, and JSON."""

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

LONGEST_TEMPORARY_FOLDER = 107 - len("/pymp-XXXXXXXX/listener-XXXXXXXX")  # bytes


def fsync(path: Path) -> None:
    """Force a file, or the entries of a folder, to disk."""
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
    """Return a hidden name beside `path` that no other process uses, on this machine or another."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def remove_temporaries(path: Path) -> None:
    """Remove what `temporary_beside` has named for `path`, in killed processes too, once `path` is there."""
    for left_over in path.parent.glob(f".{glob.escape(path.name)}.????????.tmp"):
        if left_over.is_dir():
            shutil.rmtree(left_over, ignore_errors=True)
        else:
            left_over.unlink(missing_ok=True)


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
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


def write_text_atomically(path: Path, text: str) -> None:
    """`write_atomically` of a text.

    Raises:
        OSError: as there.
    """

    def write(temporary: Path) -> None:
        temporary.write_text(text)

    write_atomically(path, write)


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


def check_output(given: str, file: Path) -> None:
    """Find out before long work whether `write_atomically` will be able to put a file there; nothing is changed.

    Args:
        given: how the user gave it, as in "--json=FILE", for the error.

    Raises:
        UserError: its folder is not there or cannot be written, or something that is no file has its name.
    """
    probe = temporary_beside(file)
    try:
        if file.exists() and not file.is_file():
            raise UserError(f"{given}: cannot be written (not a file); give another name")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{given}: cannot be written ({error.strerror or error}); give another place") from error


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/metaformer or ~/.cache/metaformer: for what can be downloaded or computed again.

    A user without a home, as an unknown number in a container is, has one in the folder for temporary files.

    Raises:
        UserError: there, another user has taken its name.
    """
    given = os.environ.get("XDG_CACHE_HOME")
    if given:
        return Path(given) / "metaformer"
    try:
        return Path.home() / ".cache" / "metaformer"
    except RuntimeError:
        folder = Path(tempfile.gettempdir()) / f"metaformer-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        owned = folder.lstat().st_uid == os.getuid() and not folder.is_symlink()
    except OSError:  # whoever writes there gets the error
        return folder
    if not owned:
        raise UserError(f"{folder}: belongs to another user, and this one has no home folder; set XDG_CACHE_HOME")
    return folder


def check_temporary_folder() -> None:
    """Refuse a folder for temporary files in which processes cannot reach each other.

    A Unix socket's path has at most 107 bytes; Python's are FOLDER/pymp-XXXXXXXX/listener-XXXXXXXX.

    Raises:
        UserError: its name is too long.
    """
    folder = tempfile.gettempdir()
    if len(os.fsencode(folder)) > LONGEST_TEMPORARY_FOLDER:
        raise UserError(
            f"TMPDIR={folder}: {len(os.fsencode(folder))} bytes long, and worker processes need a path of at most "
            f"{LONGEST_TEMPORARY_FOLDER}; export TMPDIR=/tmp, or use workers=0"
        )

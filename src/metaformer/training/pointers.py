"""The pointers RUN/checkpoints/last and best: each names a checkpoint in the same folder.

A pointer is a symbolic link, or, on file systems without links (SMB, exFAT, some FUSE), a file that contains the
checkpoint's name. In a run folder copied with `cp -rL` or `scp -r`, it is a folder: a copy of the checkpoint.
"""

import itertools
import os
import re
import shutil
from pathlib import Path
from typing import Any

from metaformer.errors import UserError
from metaformer.files import fsync, write_text_atomically
from metaformer.training.manifest import read_manifest, verify

LAST, BEST = "last", "best"
NAME = re.compile(r"epoch-(\d+)|step-\d+")  # name of a checkpoint
_MOST_BYTES = 64  # maximum size of a pointer file


def read_pointer(pointer: Path) -> Path | None:
    """Return the checkpoint that a pointer of any form names, or None if there is no pointer.

    The checkpoint need not exist.

    Raises:
        UserError: the pointer is damaged, or leads out of its folder.
    """
    try:
        if pointer.is_symlink():
            return _named_by_link(pointer)
        if pointer.is_dir():
            return pointer
        if not pointer.exists():
            return None
        name = pointer.read_text().strip() if pointer.is_file() and pointer.stat().st_size <= _MOST_BYTES else ""
    except OSError as error:
        raise UserError(f"{pointer}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError:
        name = ""
    if not NAME.fullmatch(name):
        raise UserError(f"{pointer}: damaged: it does not name a checkpoint")
    return pointer.with_name(name)


def follow(path: Path) -> Path:
    """Replace a pointer file by the checkpoint that it names, if it is the last or second-to-last part of a path.

    The operating system itself follows links and folders.
    """
    if path.parent.name in (LAST, BEST):
        return follow(path.parent) / path.name
    if path.name in (LAST, BEST) and path.parent.name == "checkpoints" and path.is_file():
        return read_pointer(path) or path
    return path


def write_pointer(pointer: Path, name: str) -> None:
    """Point to a checkpoint, atomically, replacing whatever has the pointer's name.

    A folder with that name is removed if it is a copy of a complete checkpoint next to it, and renamed otherwise.

    Raises:
        OSError: neither a link nor a file can be written.
    """
    if pointer.is_dir() and not pointer.is_symlink():
        _make_way(pointer)
    temporary = pointer.with_name(f".{pointer.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(name)
        temporary.replace(pointer)
        fsync(pointer.parent)
    except OSError:  # file systems without links raise different errors
        temporary.unlink(missing_ok=True)
        write_text_atomically(pointer, f"{name}\n")


def _named_by_link(pointer: Path) -> Path:
    target = pointer.parent / pointer.readlink()
    inside = os.path.realpath(target.parent) == os.path.realpath(pointer.parent)
    if not inside or not NAME.fullmatch(target.name):
        raise UserError(
            f"{pointer}: damaged: it points to {pointer.readlink()}, not to a checkpoint beside it; to start from "
            "another run's checkpoint, give resume=FOLDER and another run_dir"
        )
    return pointer.with_name(target.name)


def _make_way(copy: Path) -> None:
    """Remove a folder with a pointer's name if it is a copy of a complete checkpoint next to it, else rename it."""
    own = None
    try:
        manifest = read_manifest(copy)
        if any(_is_same(beside, manifest) for beside in copy.parent.glob("*-*") if NAME.fullmatch(beside.name)):
            gone = copy.with_name(f".{copy.name}.old.tmp")
            copy.rename(gone)  # half removed, it would be a damaged pointer
            shutil.rmtree(gone)
            return
        progress = manifest["progress"]
        within = progress["steps_in_epoch"]
        own = f"step-{progress['step']:08d}" if within else f"epoch-{progress['epochs_completed']:03d}"
    except (UserError, KeyError, TypeError, ValueError):
        pass  # not a checkpoint
    spare = f"{copy.name}.replaced"
    names = itertools.chain([own] if own else [], [spare], (f"{spare}-{number}" for number in itertools.count(2)))
    copy.rename(next(free for name in names if not (free := copy.with_name(name)).exists()))


def _is_same(checkpoint: Path, manifest: dict[str, Any]) -> bool:
    try:
        return read_manifest(checkpoint) == manifest and verify(checkpoint) == manifest
    except UserError:
        return False

"""Checks before training that a folder can store a run's checkpoints."""

import errno
import secrets
import shutil
from pathlib import Path

from metaformer.errors import UserError
from metaformer.files import fsync
from metaformer.training.pointers import LAST, write_pointer


def try_out(place: Path) -> None:
    """Try every operation of a save in a folder, and clean up; raise an error that names an operation that fails."""
    folder = place / f".probe-{secrets.token_hex(4)}.tmp"
    written, renamed = folder / "new", folder / "old"
    step = "making a folder"
    try:
        (folder / "checkpoint").mkdir(parents=True)
        step = "writing a file"
        for file in (written, renamed):
            file.write_text(file.name)
        step = "fsync"
        fsync(written)
        fsync(folder)
        step = "renaming a file over another"
        written.replace(renamed)
        if renamed.read_text() != "new":
            raise OSError(errno.EIO, "the old one is still there")
        step = "renaming a folder"
        (folder / "checkpoint").rename(folder / "epoch-001")
        step = "making a symbolic link, or a file in its place,"
        write_pointer(folder / LAST, "epoch-001")
    except OSError as error:
        raise UserError(
            f"run_dir: {step} fails in {place} ({error.strerror or error}), which saving needs; give a run_dir on "
            "another file system"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_room(place: Path, count: int, size: int) -> None:
    """Raise an error if a file system has no space for `count` checkpoints of `size` bytes."""
    usage = shutil.disk_usage(place)
    if usage.total and usage.free < count * size:  # some file systems do not report it
        free, each = (f"{number / 2**20:,.0f} MiB" for number in (usage.free, size))
        checkpoints = f"{count} checkpoint{'s' if count > 1 else ''} of about {each}"
        raise UserError(
            f"run_dir: {free} are free in {place}, and {checkpoints} must fit; make room, or give another run_dir"
        )

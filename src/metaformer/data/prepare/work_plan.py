"""Record of the images and options of an interrupted preparation, which is resumed only with the same ones."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from metaformer.errors import UserError
from metaformer.files import write_text_atomically


def check_same_plan(folder: Path, description: Iterable[str]) -> None:
    """Record what is written to `folder`, or compare it with the record of an interrupted call.

    Args:
        description: options and images.

    Raises:
        UserError: the interrupted call had another description.
    """
    digest = hashlib.sha256()
    for line in description:
        digest.update(line.encode(errors="surrogateescape") + b"\n")
    plan = _plan_file(folder)
    if plan.exists() and plan.read_bytes() != digest.hexdigest().encode():
        raise UserError(f"{folder.parent}: was started with other images or other options; repeat that command, or "
                        "remove it")  # fmt: skip
    write_text_atomically(plan, digest.hexdigest())


def finish_plan(folder: Path) -> None:
    """Remove the record from a complete folder."""
    _plan_file(folder).unlink(missing_ok=True)  # another process may have done the same work


def cannot_write(path: Path, error: OSError) -> UserError:
    """Return the error for a full disk, for example; what is complete is kept."""
    return UserError(f"{path}: cannot be written ({error.strerror or error}); the same command resumes from here")


def _plan_file(folder: Path) -> Path:
    return folder / "plan.sha256"

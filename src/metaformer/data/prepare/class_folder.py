"""Writing a class folder that is there whole or not at all."""

import os
import shutil
from pathlib import Path

from metaformer.data.prepare.pieces import Piece, read_pieces
from metaformer.errors import UserError
from metaformer.files import remove_temporaries, temporary_beside


def write_class_folder(folder: Path, pieces: list[Piece]) -> int:
    """Make a class folder, unless it is there already with all its files; returns its number of images.

    Raises:
        UserError: as `read_pieces`, or the disk refuses; the folder does not exist then.
    """
    files = {piece.name.partition("/")[2]: piece.size for piece in pieces}
    if _sizes(folder) == files:
        return len(pieces)
    temporary = temporary_beside(folder)
    try:
        shutil.rmtree(folder, ignore_errors=True)
        for name in {os.path.dirname(name) for name in files}:  # noqa: PTH120
            (temporary / name).mkdir(parents=True, exist_ok=True)
        for piece, content in read_pieces(pieces):
            (temporary / piece.name.partition("/")[2]).write_bytes(content)
        temporary.rename(folder)
    except OSError as error:
        if _sizes(folder) != files:  # else another process has just written the same
            raise UserError(f"{folder}: cannot be written ({error.strerror or error}); the same command goes on from "
                            "here") from error  # fmt: skip
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    remove_temporaries(folder)
    return len(pieces)


def _sizes(folder: Path) -> dict[str, int]:
    """Of all files below a folder; none where there is no such folder."""
    found = {}
    for place, _, names in os.walk(folder):
        for name in names:
            file = Path(place, name)
            found[str(file.relative_to(folder))] = file.stat().st_size
    return found

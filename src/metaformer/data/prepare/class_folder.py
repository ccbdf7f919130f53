"""Atomic writing of class folders."""

import os
import shutil
from pathlib import Path

from metaformer.data.prepare.source_images import SourceImage, read_source_images
from metaformer.errors import UserError
from metaformer.files import remove_temporaries, temporary_beside


def write_class_folder(folder: Path, sources: list[SourceImage]) -> int:
    """Write a class folder, unless it already exists with all its files; return its number of images.

    If this fails, the folder does not exist.
    """
    files = {source.name.partition("/")[2]: source.size for source in sources}
    if _sizes(folder) == files:
        return len(sources)
    temporary = temporary_beside(folder)
    try:
        shutil.rmtree(folder, ignore_errors=True)
        for name in {os.path.dirname(name) for name in files}:  # noqa: PTH120
            (temporary / name).mkdir(parents=True, exist_ok=True)
        for source, content in read_source_images(sources):
            (temporary / source.name.partition("/")[2]).write_bytes(content)
        temporary.rename(folder)
    except OSError as error:
        if _sizes(folder) != files:  # otherwise another process has just written the same folder
            raise UserError(f"{folder}: cannot be written ({error.strerror or error}); the same command resumes from "
                            "here") from error  # fmt: skip
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    remove_temporaries(folder)
    return len(sources)


def _sizes(folder: Path) -> dict[str, int]:
    """Return the sizes of all files below a folder; empty if it does not exist."""
    sizes = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            file = Path(parent, name)
            sizes[str(file.relative_to(folder))] = file.stat().st_size
    return sizes

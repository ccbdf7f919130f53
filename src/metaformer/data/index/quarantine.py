"""Quarantine lists: files to exclude from a data set, such as those that scripts/scan_data.py found broken."""

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np

from metaformer.data.index.config import DataConfig
from metaformer.data.index.image_index import ImageIndex
from metaformer.errors import UserError
from metaformer.files import write_atomically


def drop_quarantined(index: ImageIndex, config: DataConfig, split: str) -> ImageIndex:
    """Return the index of a split without the files that `config.quarantine` lists.

    Each line is SPLIT/CLASS/IMAGE, below `config.root`. Lines of the data set's other split are ignored.
    """
    if config.quarantine is None:
        return index
    field = f"data.quarantine={config.quarantine}"
    splits = [name for name in (config.train_split, config.val_split) if name is not None]
    listed: set[int] = set()
    for path in read_quarantine(config):
        matching_splits = [name for name in splits if _is_below(path, name)]
        if not matching_splits:
            raise UserError(
                f"{field}: {path!r} is in no split of data={config.name} ({', '.join(splits)}); remove the line"
            )
        if split in matching_splits:
            listed.add(_position(index, str(PurePosixPath(path).relative_to(split)), f"{field}: {path!r}"))
    if not listed:
        return index
    kept = np.delete(np.arange(len(index)), sorted(listed))
    empty = np.setdiff1d(index.labels[sorted(listed)], index.labels[kept])
    if len(empty):
        raise UserError(
            f"{field}: leaves no images in class folder {(index.folder / index.classes[empty[0]]).absolute()}; "
            "repair one of its files"
        )
    return replace(index.select(kept), quarantined=len(listed))


def read_quarantine(config: DataConfig) -> list[str]:
    """Return the lines of `config.quarantine` without duplicates."""
    assert config.quarantine is not None
    try:
        content = Path(config.quarantine).read_bytes()
    except OSError as error:
        raise UserError(
            f"data.quarantine={config.quarantine}: cannot be read ({error.strerror}); "
            f"write it with `python scripts/scan_data.py {config.root} --quarantine FILE`, or set it to null"
        ) from error
    return list(dict.fromkeys(os.fsdecode(line) for line in content.split(b"\n") if line))


def write_quarantine(file: Path, paths: Iterable[str]) -> None:
    """Write a quarantine list atomically."""
    content = b"".join(os.fsencode(path) + b"\n" for path in paths)

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    write_atomically(file, write)


def _is_below(path: str, split: str) -> bool:
    below = PurePosixPath(path)
    return not below.is_absolute() and ".." not in below.parts and below.is_relative_to(split)


def _position(index: ImageIndex, path: str, line: str) -> int:
    """Return a file's position in the index. Only its class is searched, so large data sets stay fast."""
    folder = path.split("/")[0]
    if folder in index.classes:
        first, end = np.searchsorted(index.labels, np.arange(2) + index.classes.index(folder)).tolist()
        length, name = index.paths.shape[1], os.fsencode(path)
        rows = index.paths[first:end].tobytes()
        for position in range(first, end):
            start = (position - first) * length
            if rows[start : start + length].rstrip(b"\0") == name:
                return int(position)
    raise UserError(f"{line}: no such image in {index.folder.absolute()}; remove the line if the file is gone")

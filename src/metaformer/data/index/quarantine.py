"""Files that are left out of a data set because a list names them: those that scripts/scan_data.py found broken."""

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
    """The index of a split without the files that `config.quarantine` lists; as it was, if it lists none of them.

    Lines are SPLIT/CLASS/IMAGE, below `config.root`; those of the data set's other split are passed over.

    Raises:
        UserError: the list cannot be read, a line is no file of either split, or a class would have no image left.
    """
    if config.quarantine is None:
        return index
    field = f"data.quarantine={config.quarantine}"
    splits = [name for name in (config.train_split, config.val_split) if name is not None]
    listed: set[int] = set()
    for path in read_quarantine(config):
        named = [name for name in splits if _is_below(path, name)]
        if not named:
            raise UserError(
                f"{field}: {path!r} is in no split of data={config.name} ({', '.join(splits)}); remove the line"
            )
        if split in named:
            listed.add(_position(index, str(PurePosixPath(path).relative_to(split)), f"{field}: {path!r}"))
    if not listed:
        return index
    kept = np.delete(np.arange(len(index)), sorted(listed))
    empty = np.setdiff1d(index.labels[sorted(listed)], index.labels[kept])
    if len(empty):
        raise UserError(
            f"{field}: leaves no image in class folder {(index.folder / index.classes[empty[0]]).absolute()}; "
            "repair one of its files"
        )
    return replace(index.select(kept), quarantined=len(listed))


def read_quarantine(config: DataConfig) -> list[str]:
    """The lines of `config.quarantine`, each once.

    Raises:
        UserError: it cannot be read.
    """
    assert config.quarantine is not None
    try:
        content = Path(config.quarantine).read_bytes()
    except OSError as error:
        raise UserError(
            f"data.quarantine={config.quarantine}: cannot be read ({error.strerror}); "
            f"write it with `python scripts/scan_data.py {config.root} --quarantine FILE`, or leave it null"
        ) from error
    return list(dict.fromkeys(os.fsdecode(line) for line in content.split(b"\n") if line))


def write_quarantine(file: Path, paths: Iterable[str]) -> None:
    """Write a list, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    content = b"".join(os.fsencode(path) + b"\n" for path in paths)

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    write_atomically(file, write)


def _is_below(path: str, split: str) -> bool:
    below = PurePosixPath(path)
    return not below.is_absolute() and ".." not in below.parts and below.is_relative_to(split)


def _position(index: ImageIndex, path: str, line: str) -> int:
    """A file's place in the index; only its class is searched, however large the data set is."""
    folder = path.split("/")[0]
    if folder in index.classes:
        first, last = np.searchsorted(index.labels, np.arange(2) + index.classes.index(folder)).tolist()
        length, name = index.paths.shape[1], os.fsencode(path)
        rows = index.paths[first:last].tobytes()
        for position in range(first, last):
            start = (position - first) * length
            if rows[start : start + length].rstrip(b"\0") == name:
                return int(position)
    raise UserError(f"{line}: no such image in {index.folder.absolute()}; remove the line if the file is gone")

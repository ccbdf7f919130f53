"""Images on their way from where they lie into a data set: ranges of bytes of files, archives or shards."""

import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from metaformer.data.index.image_index import ImageIndex
from metaformer.errors import UserError


class Piece(NamedTuple):
    """An image, where it lies now."""

    name: str  # CLASS/IMAGE, as the data set is to call it
    file: str
    offset: int  # 0: the file is the image
    size: int

    @property
    def class_name(self) -> str:
        """Its class folder."""
        return self.name.partition("/")[0]


def pieces_of(index: ImageIndex) -> list[Piece]:
    """The images of a data set, in its order."""
    folder, sizes = os.fspath(index.folder), index.sizes.tolist()
    names = [index.name(sample) for sample in range(len(index))]
    if index.shards is None:
        return [Piece(name, f"{folder}/{name}", 0, size) for name, size in zip(names, sizes, strict=True)]
    tars = [f"{folder}/{tar}" for tar in index.shards.names]
    places = zip(names, index.shards.numbers.tolist(), index.shards.offsets.tolist(), sizes, strict=True)
    return [Piece(name, tars[number], offset, size) for name, number, offset, size in places]


def read_pieces(pieces: Iterable[Piece]) -> Iterator[tuple[Piece, bytes]]:
    """Each piece with its bytes; pieces that follow each other in one file open it once.

    Raises:
        UserError: a file cannot be read, ends too early, or is another than it was.
    """
    for file, run in itertools.groupby(pieces, key=lambda piece: piece.file):
        try:
            with Path(file).open("rb", buffering=0) as opened:
                for piece in run:
                    content = _read(opened.fileno(), piece)
                    grown = piece.offset == 0 and os.fstat(opened.fileno()).st_size != piece.size
                    if len(content) != piece.size or grown:
                        raise UserError(f"{file}: cut short, or changed meanwhile, in {piece.name}; get it again")
                    yield piece, content
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror or error})") from error


def _read(descriptor: int, piece: Piece) -> bytes:
    parts, done = [], 0
    while done < piece.size:
        part = os.pread(descriptor, piece.size - done, piece.offset + done)
        if not part:
            break
        parts.append(part)
        done += len(part)
    return b"".join(parts)

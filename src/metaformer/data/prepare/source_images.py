"""Source images of a data set to be written, as byte ranges of files, archives or shards."""

import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from metaformer.data.index.image_index import ImageIndex
from metaformer.errors import UserError


class SourceImage(NamedTuple):
    """An image to copy into a data set."""

    name: str  # CLASS/IMAGE in the new data set
    file: str  # file that contains the image now
    offset: int  # 0 if the file is the image
    size: int  # in bytes

    @property
    def class_name(self) -> str:
        """Name of the image's class folder."""
        return self.name.partition("/")[0]

    @property
    def location(self) -> str:
        """The image's current location, for messages."""
        return self.file if self.offset == 0 else f"{self.file}: {self.name}"


def list_source_images(index: ImageIndex) -> list[SourceImage]:
    """List the images of a data set in the order of its index."""
    if index.shards is not None and index.shards.pixels is not None:
        raise UserError(f"{index.folder}: contains decoded pixels; give the data set that they were made from")
    folder, sizes = os.fspath(index.folder), index.sizes.tolist()
    names = [index.name(sample) for sample in range(len(index))]
    if index.shards is None:
        return [SourceImage(name, f"{folder}/{name}", 0, size) for name, size in zip(names, sizes, strict=True)]
    tars = [f"{folder}/{tar}" for tar in index.shards.names]
    rows = zip(names, index.shards.numbers.tolist(), index.shards.offsets.tolist(), sizes, strict=True)
    return [SourceImage(name, tars[number], offset, size) for name, number, offset, size in rows]


def read_source_images(sources: Iterable[SourceImage]) -> Iterator[tuple[SourceImage, bytes]]:
    """Yield each image with its bytes, opening a file only once for consecutive images."""
    for file, run in itertools.groupby(sources, key=lambda source: source.file):
        try:
            with Path(file).open("rb", buffering=0) as opened:
                for source in run:
                    content = _read(opened.fileno(), source)
                    grown = source.offset == 0 and os.fstat(opened.fileno()).st_size != source.size
                    if len(content) != source.size or grown:
                        raise UserError(f"{file}: truncated or changed at {source.name}; copy or download it again")
                    yield source, content
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror or error})") from error


def _read(descriptor: int, source: SourceImage) -> bytes:
    parts, done = [], 0
    while done < source.size:
        part = os.pread(descriptor, source.size - done, source.offset + done)
        if not part:
            break
        parts.append(part)
        done += len(part)
    return b"".join(parts)

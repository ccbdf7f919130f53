"""Parallel writer of decoded pixels, in the layout that `pixels` reads.

The sizes of all images are read before the first is decoded. They determine the disk space and the images of each
file. Each file is written atomically, and pixels.json when all exist; repeating an interrupted call writes what is
missing. Equal images give byte-identical files.
"""

import hashlib
import json
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from PIL import Image

from metaformer.data.index.files import sorting_key
from metaformer.data.index.pixel_file import (
    CHANNELS,
    MAX_IMAGES,
    PixelEntry,
    encode_header,
    read_header_bytes,
    write_header,
)
from metaformer.data.index.pixels import MANIFEST, ListedFile, pixel_file_name
from metaformer.data.index.shards import is_member_name
from metaformer.data.load.bad_file import BAD_FILE, describe_bad_file
from metaformer.data.load.image_file import decode_rgb
from metaformer.data.prepare.image_sizes import ImageSize, read_sizes
from metaformer.data.prepare.processes import ProgressCallback
from metaformer.data.prepare.source_images import SourceImage, read_source_images
from metaformer.data.prepare.work_plan import cannot_write, check_same_plan, finish_plan, run_tasks, split_by_size
from metaformer.errors import UserError
from metaformer.files import fsync, remove_temporaries, sha256, temporary_beside, write_text_atomically

CHUNK = 512  # images whose sizes a process reads at a time


@dataclass(frozen=True)
class PixelPacking:
    """Settings for storing decoded pixels.

    Attributes:
        shard_bytes: maximum size of a file; a single larger image gets its own file.
        resize: length in pixels to which the short side of larger images is reduced; None to keep all sizes.
    """

    shard_bytes: int = 256 * 10**6
    resize: int | None = None

    @property
    def keeps_images(self) -> bool:
        """Whether all pixels are stored unchanged."""
        return self.resize is None


class SizedImage(NamedTuple):
    """A source image and the size in which it is stored."""

    source: SourceImage
    size: ImageSize

    @property
    def entry(self) -> PixelEntry:
        """The image's entry, without the checksum."""
        return PixelEntry(self.source.name, self.size.height, self.size.width, self.source.size, 0)

    @property
    def bytes(self) -> int:
        """Size of the pixels in bytes."""
        return self.size.width * self.size.height * CHANNELS


class _Task(NamedTuple):
    """A file to write."""

    path: Path
    images: list[SizedImage]
    resize: int | None


def stored_size(size: ImageSize, resize: int | None) -> ImageSize:
    """Return the size after reducing the short side to `resize`; smaller images keep theirs."""
    short = min(size)
    if resize is None or short <= resize:
        return size
    return ImageSize(*(max(1, round(side * resize / short)) for side in size))


def size_images(
    sources: Sequence[SourceImage], packing: PixelPacking, pool: Executor, report: Callable[[int, int], None]
) -> list[SizedImage]:
    """Return the images in the order in which they are stored, with their sizes.

    Args:
        report: called with the number of images whose size is known, and the number of all images.
    """
    sources = sorted(sources, key=lambda source: sorting_key(source.name))
    _check_names(sources)
    sizes: list[ImageSize] = []
    for chunk in pool.map(read_sizes, [sources[first : first + CHUNK] for first in range(0, len(sources), CHUNK)]):
        sizes += chunk
        report(len(sizes), len(sources))
    return [SizedImage(source, stored_size(size, packing.resize)) for source, size in zip(sources, sizes, strict=True)]


def check_disk_space(images: Sequence[SizedImage], folder: Path) -> None:
    """Print the space that the pixels still need in `folder`; raise an error if the disk does not have it."""
    needed = sum(image.bytes + len(image.source.name) + 100 for image in images)
    present = sum(file.stat().st_size for file in folder.rglob("pixels-*.safetensors"))
    free = shutil.disk_usage(folder).free
    missing = max(0, needed - present)
    sizes = f"{len(images):,} images take {needed / 1e9:,.1f} GB as pixels"
    if present:
        sizes += f", of which {present / 1e9:,.1f} GB are written"
    if missing > free:
        raise UserError(
            f"{folder.parent}: {sizes}, but only {free / 1e9:,.1f} GB are free there; use another disk, or a smaller "
            "--resize"
        )
    print(f"{sizes}; {free / 1e9:,.1f} GB are free in {folder.parent}", file=sys.stderr, flush=True)


def write_pixels(
    images: list[SizedImage], folder: Path, packing: PixelPacking, pool: Executor, report: ProgressCallback
) -> None:
    """Decode images into files in `folder`.

    If this fails, the work done so far is kept.
    """
    parts = enumerate(split_by_size(images, packing.shard_bytes, lambda image: image.bytes, MAX_IMAGES))
    tasks = [_Task(folder / pixel_file_name(number), part, packing.resize) for number, part in parts]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_same_plan(folder, [repr(packing), *(repr(image.entry) for image in images)])
        done = 0

        def report_file(task: _Task) -> None:
            nonlocal done
            done += len(task.images)
            report(f"decoding {folder.name}", done, len(images))

        rows = run_tasks(write_pixel_file, tasks, pool, report_file)
        write_text_atomically(folder / MANIFEST, json.dumps({"files": rows}))
        finish_plan(folder)
    except OSError as error:
        raise cannot_write(folder, error) from error


def write_pixel_file(task: _Task) -> ListedFile:
    """Write a file unless it exists; return its line of the manifest."""
    path = task.path
    try:
        if not path.exists():
            _write(task)
        header = hashlib.sha256(read_header_bytes(path)).hexdigest()
        return ListedFile(len(task.images), path.stat().st_size, header, sha256(path))
    except OSError as error:
        raise cannot_write(path, error) from error


def _write(task: _Task) -> None:
    temporary = temporary_beside(task.path)
    try:
        with temporary.open("wb") as file:
            file.write(encode_header([image.entry for image in task.images], task.resize))
            entries = list(_write_images(file, task))
            write_header(file, entries, task.resize)
        fsync(temporary)
        temporary.rename(task.path)
    finally:
        temporary.unlink(missing_ok=True)
    remove_temporaries(task.path)


def _write_images(file: BinaryIO, task: _Task) -> Iterator[PixelEntry]:
    """Append the pixels of each image; yield the entries with their checksums."""
    contents = read_source_images(image.source for image in task.images)
    for image, (source, content) in zip(task.images, contents, strict=True):
        try:
            decoded = decode_rgb(content)
        except BAD_FILE as error:
            raise UserError(describe_bad_file(source.location, error)) from error
        if stored_size(ImageSize(*decoded.size), task.resize) != image.size:
            raise UserError(f"{source.location}: has changed while it was being read; start again")
        if decoded.size != image.size:
            decoded = decoded.resize(image.size, Image.Resampling.LANCZOS)
        pixels = decoded.tobytes()
        file.write(pixels)
        yield image.entry._replace(checksum=zlib.crc32(pixels))


def _check_names(sources: Sequence[SourceImage]) -> None:
    seen = set()
    for name, *_ in sources:
        if not is_member_name(name):
            raise UserError(f"refused: {name!r} is not CLASS/IMAGE")
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{name!r}: files of pixels require names in UTF-8; rename it") from error
        if name in seen:
            raise UserError(f"{name!r} occurs twice; remove one")
        seen.add(name)

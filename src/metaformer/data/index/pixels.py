"""Scan of a split stored as decoded pixels (`pixel_file`), which loaders map into memory and crop in place.

SPLIT/pixels-000000.safetensors, pixels-000001.safetensors, ... contain the images in sorted order. pixels.json lists
each file's number of images, its size, and the SHA-256 of its header and of the whole file.
"""

import hashlib
import json
import os
import re
import stat
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from metaformer.data.index.files import THREADS, SplitScan, arrange, fingerprint, holds_packed
from metaformer.data.index.pixel_file import (
    PixelEntry,
    PixelHeader,
    damaged,
    decode_header,
    find_truncated_entry,
    read_header_bytes,
)
from metaformer.errors import UserError
from metaformer.files import sha256

MANIFEST = "pixels.json"

_FILE = re.compile(r"pixels-\d{6}\.safetensors")


class ListedFile(NamedTuple):
    """A file of pixels as listed in the manifest; the digests are SHA-256 in hexadecimal."""

    images: int
    size: int  # in bytes
    header_digest: str
    digest: str


@dataclass(frozen=True)
class PixelScan(SplitScan):
    """The scan of a split stored as pixels, with the order and labels of the original folders.

    `sizes` are the sizes of the pixels. If images have their original size, the fingerprint is that of the folders.

    Attributes:
        files: by file name in order: number of images, size in bytes, both digests, modification time in nanoseconds.
        numbers, offsets: int64 [N], as in `Shards`.
        shapes, checksums: int64 [N, 2] and [N], as in `Pixels`.
    """

    ARRAYS: ClassVar = ("paths", "labels", "sizes", "numbers", "offsets", "shapes", "checksums")

    files: dict[str, list[Any]]
    numbers: NDArray[np.int64]
    offsets: NDArray[np.int64]
    shapes: NDArray[np.int64]
    checksums: NDArray[np.int64]


class PixelSource:
    """A split stored as pixels."""

    scan_type: ClassVar = PixelScan

    def __init__(self, folder: Path) -> None:
        self._folder, self._files = folder, list_pixel_files(folder)

    @property
    def expected(self) -> dict[str, Any]:
        """Attribute values that a cached scan must have."""
        return {"files": self._files}

    def is_current(self, cached: PixelScan, check_all: bool) -> bool:
        """Return True, because `expected` already detects a stale scan.

        With `check_all`, a file that does not have its SHA-256 is an error.
        """
        if check_all:
            check_digests(self._folder, self._files)
        return True

    def scan(self, check_all: bool = False) -> PixelScan:
        """Read the headers of all files."""
        if check_all:
            check_digests(self._folder, self._files)
        return scan_pixels(self._folder, self._files)


def pixel_file_name(number: int) -> str:
    """Return the name of a file of pixels."""
    return f"pixels-{number:06}.safetensors"


def holds_pixels(folder: Path) -> bool:
    """Return whether a split's folder contains decoded pixels."""
    return holds_packed(folder, MANIFEST, _FILE)


def list_pixel_files(folder: Path) -> dict[str, list[Any]]:
    """List the files of a folder, as `PixelScan.files`.

    Raises:
        OSError: the folder cannot be read.
    """
    listed = _read_manifest(folder / MANIFEST)
    entries = {entry.name: entry for entry in os.scandir(folder) if not entry.name.startswith(".")}
    files: dict[str, list[Any]] = {}
    for number, file in enumerate(listed):
        name = pixel_file_name(number)
        if name not in entries:
            raise UserError(f"{folder / name}: missing; {MANIFEST} lists {len(listed)} files, copy them again")
        status = entries[name].stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{folder / name}: a FIFO, socket or device; copy it again")
        if status.st_size != file.size:
            lost = find_truncated_entry(folder / name)
            raise damaged(
                folder / name,
                f"{f'{lost}: ' if lost else ''}truncated or changed: {status.st_size:,} bytes, not the {file.size:,} "
                f"that {MANIFEST} lists",
            )
        files[name] = [*file, status.st_mtime_ns]
    unexpected = [name for name in entries if (_FILE.fullmatch(name) and name not in files) or entries[name].is_dir()]
    if unexpected:
        raise UserError(f"{folder / min(unexpected)}: beside pixels, but not listed in {MANIFEST}; remove it")
    return files


def scan_pixels(folder: Path, files: dict[str, list[Any]]) -> PixelScan:
    """Read the headers of the files."""
    entries: list[PixelEntry] = []
    places: list[tuple[int, int]] = []
    resizes = set()
    for number, (name, (images, size, header_digest, *_)) in enumerate(files.items()):
        header = _read_header(folder / name, images, size, header_digest)
        resizes.add(header.resize)
        offsets = header.first_offset + np.cumsum([0, *(entry.size for entry in header.entries[:-1])])
        entries += header.entries
        places += [(number, offset) for offset in offsets.tolist()]
    if not entries or len(resizes) > 1:
        raise UserError(f"{folder}: its files contain no images, or were made with several --resize; prepare it again")
    (resize,) = resizes
    found = arrange([entry.name for entry in entries], folder)
    entries = [entries[position] for position in found.order]
    numbers, offsets = np.ascontiguousarray(np.array(places, np.int64)[found.order].T)
    columns = [(entry.size, entry.source_size, entry.checksum) for entry in entries]
    sizes, source_sizes, checksums = np.ascontiguousarray(np.array(columns, np.int64).T)
    shapes = np.array([(entry.height, entry.width) for entry in entries], np.int64)
    if resize is None:
        digest = fingerprint(found.classes, found.paths, source_sizes)
    else:
        digest = hashlib.sha256(f"{fingerprint(found.classes, found.paths, sizes)} {resize}".encode()).hexdigest()
    return PixelScan(
        found.classes, found.paths, found.labels, sizes, digest, files, numbers, offsets, shapes, checksums
    )


def check_digests(folder: Path, files: dict[str, list[Any]]) -> None:
    """Compare the SHA-256 of each file with the manifest; an error names the file and its first changed image."""
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(lambda name: _check_digest(folder / name, *files[name][:4]), files):
            pass


def _check_digest(path: Path, images: int, size: int, header_digest: str, digest: str) -> None:
    if sha256(path) == digest:
        return
    header = _read_header(path, images, size, header_digest)
    with path.open("rb") as file:
        file.seek(header.first_offset)
        for entry in header.entries:
            if zlib.crc32(file.read(entry.size)) != entry.checksum:
                raise damaged(path, f"{entry.name}: its pixels have changed (they do not have their CRC-32)")
    raise damaged(path, f"it does not have the SHA-256 that {MANIFEST} lists")


def _read_header(path: Path, images: int, size: int, header_digest: str) -> PixelHeader:
    content = read_header_bytes(path)
    if hashlib.sha256(content).hexdigest() != header_digest:
        raise damaged(path, f"its header does not have the SHA-256 that {MANIFEST} lists")
    header = decode_header(path, content, size)
    if len(header.entries) != images:
        raise damaged(path, f"{len(header.entries):,} images, not the {images:,} that {MANIFEST} lists")
    return header


def _read_manifest(file: Path) -> list[ListedFile]:
    try:
        if file.exists() and not file.is_file():
            raise ValueError("a FIFO, socket or device")
        listed = [ListedFile(*row) for row in json.loads(file.read_text())["files"]]
        for row in listed:
            counts, digests = row[:2], row[2:]
            if not all(type(count) is int and count >= 0 for count in counts):
                raise ValueError("not counts")
            if not all(isinstance(digest, str) for digest in digests):
                raise ValueError("not digests")
        return listed
    except FileNotFoundError as error:
        raise UserError(f"{file}: missing, so files may be missing too; copy it, or prepare the data again") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{file}: damaged; copy it again, or prepare the data again") from error

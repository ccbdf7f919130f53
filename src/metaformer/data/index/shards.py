"""Scan of a split packed into shards: WebDataset tars, read in place by the byte ranges that their indices list.

SPLIT/shard-000000.tar, shard-000001.tar, ... contain CLASS/NAME.EXT, each followed by its label CLASS/NAME.cls.
shard-000000.idx has one line per image, in the format of DALI's readers.webdataset (wds2idx, version 1.2), and
shard-000000.sfv one line per image, in the same order: CLASS/NAME.EXT and the CRC-32 of its bytes. shards.json lists
the shards, so that a missing shard is detected, and says whether they have checksums, which older ones have not.
"""

import itertools
import json
import os
import re
import stat
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from metaformer.data.index.files import THREADS, SplitScan, arrange, fingerprint, holds_packed
from metaformer.errors import UserError

MANIFEST = "shards.json"
CHECKSUMS, CRC32 = "checksums", "crc32"  # a key of the manifest and its value
IDX_VERSION = b"v1.2"
BLOCK = 512  # bytes of a tar member's header; contents are padded to a multiple of it

NO_CHECKSUM = -1  # of images in shards without checksums

_SHARD = re.compile(r"shard-\d{6}\.tar")
_CHECKSUM = re.compile(rb"[0-9a-f]{8}")


class Pixels(NamedTuple):
    """Properties of images that are stored decoded, as uint8 [height, width, 3].

    Attributes:
        shapes: int64 [N, 2], height and width.
        states: size in bytes and modification time in nanoseconds of each file when it was indexed.
    """

    shapes: NDArray[np.int64]
    states: tuple[tuple[int, int], ...]


class Shards(NamedTuple):
    """The location of packed images.

    Attributes:
        names: file names of the tars, or of the files of pixels, in the split's folder.
        numbers: int64 [N], the position in `names` of each image's file.
        offsets: int64 [N], the offset of each image in its file, in bytes.
        checksums: int64 [N], CRC-32 of each image's bytes or pixels, or NO_CHECKSUM.
        pixels: given if the images are stored decoded.
    """

    names: tuple[str, ...]
    numbers: NDArray[np.int64]
    offsets: NDArray[np.int64]
    checksums: NDArray[np.int64]
    pixels: Pixels | None = None

    @property
    def arrays(self) -> tuple[NDArray[np.int64], ...]:
        """The arrays with a row for each image, in the order that `with_arrays` takes."""
        return (self.numbers, self.offsets, self.checksums, *(self.pixels[:1] if self.pixels else ()))

    def with_arrays(self, numbers: Any, offsets: Any, checksums: Any, *of_pixels: Any) -> "Shards":
        """Return the location of other images in the same files."""
        pixels = self.pixels and Pixels(of_pixels[0], self.pixels.states)
        return Shards(self.names, numbers, offsets, checksums, pixels)


class _Member(NamedTuple):
    """An image as listed in a shard's index."""

    name: str
    size: int
    offset: int
    shard: int


@dataclass(frozen=True)
class ShardScan(SplitScan):
    """The scan of a split stored as shards, with the order and labels of the original folders.

    Attributes:
        tars: by file name in order: number of images, size and modification time of the tar, size and modification
            time of its index, and of its checksums (-1 if it has none); in bytes and nanoseconds.
        numbers, offsets, checksums: int64 [N], as in `Shards`.
    """

    ARRAYS: ClassVar = ("paths", "labels", "sizes", "numbers", "offsets", "checksums")

    tars: dict[str, list[int]]
    numbers: NDArray[np.int64]
    offsets: NDArray[np.int64]
    checksums: NDArray[np.int64]


class ShardSource:
    """A split stored as shards."""

    scan_type: ClassVar = ShardScan

    def __init__(self, folder: Path) -> None:
        self._folder, self._tars = folder, list_shards(folder)

    @property
    def expected(self) -> dict[str, Any]:
        """Attribute values that a cached scan must have."""
        return {"tars": self._tars}

    def is_current(self, cached: ShardScan, check_all: bool) -> bool:
        """Return True, because `expected` already detects a stale scan.

        With `check_all`, a tar that does not match its index, or an image without its checksum, is an error.
        """
        if check_all:
            check_members(cached, self._folder)
        return True

    def scan(self, check_all: bool = False) -> ShardScan:
        """Read the indices of all shards."""
        scan = scan_shards(self._folder, self._tars)
        if check_all:
            check_members(scan, self._folder)
        return scan


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{number:06}.tar"


def holds_shards(folder: Path) -> bool:
    """Return whether a split's folder contains shards."""
    return holds_packed(folder, MANIFEST, _SHARD)


def list_shards(folder: Path) -> dict[str, list[int]]:
    """List the shards of a folder, as `ShardScan.tars`.

    Raises:
        OSError: the folder cannot be read.
    """
    manifest, has_checksums = _read_manifest(folder / MANIFEST)
    entries = {entry.name: entry for entry in os.scandir(folder) if not entry.name.startswith(".")}
    tars = {}
    for number, (images, size) in enumerate(manifest):
        name = shard_name(number)
        files = (name, _idx(name), *([_sfv(name)] if has_checksums else []))
        for file in files:
            if file not in entries:
                raise UserError(f"{folder / file}: missing; {MANIFEST} lists {len(manifest)} shards, copy them again")
        tar, *others = (entries[file].stat() for file in files)
        if not all(stat.S_ISREG(status.st_mode) for status in (tar, *others)):
            raise UserError(f"{folder / name}: it or its index is a FIFO, socket or device; copy both again")
        if tar.st_size != size:
            lost = _find_lost_image(folder / name, images, size, tar.st_size)
            raise UserError(
                f"{folder / name}: {f'{lost}: ' if lost else ''}truncated or changed: {tar.st_size:,} bytes, not the "
                f"{size:,} that {MANIFEST} lists; copy it again"
            )
        states = [number for status in others for number in (status.st_size, status.st_mtime_ns)]
        tars[name] = [images, size, tar.st_mtime_ns, *states, *([] if has_checksums else [-1, -1])]
    unexpected = [name for name in entries if (_SHARD.fullmatch(name) and name not in tars) or entries[name].is_dir()]
    if unexpected:
        raise UserError(f"{folder / min(unexpected)}: beside shards, but not listed in {MANIFEST}; remove it")
    return tars


def scan_shards(folder: Path, tars: dict[str, list[int]]) -> ShardScan:
    """Read the indices of the shards, and compare the first and last image of each shard with its tar."""
    listed = [
        _read_idx(folder / name, images, size, number) for number, (name, (images, size, *_)) in enumerate(tars.items())
    ]
    members = list(itertools.chain.from_iterable(listed))
    if not members:
        raise UserError(f"{folder}: its shards contain no images; pack the data again")
    found = arrange([member.name for member in members], folder)
    columns = np.array([member[1:] for member in members], np.int64)[found.order]
    sizes, offsets, numbers = np.ascontiguousarray(columns.T)
    digest = fingerprint(found.classes, found.paths, sizes)
    unknown = np.full_like(offsets, NO_CHECKSUM)
    scan = ShardScan(found.classes, found.paths, found.labels, sizes, digest, tars, numbers, offsets, unknown)
    order = np.lexsort((offsets, numbers))
    bounds = np.flatnonzero(np.diff(numbers[order], prepend=-1, append=len(tars)))
    check_members(scan, folder, np.union1d(order[bounds[:-1]], order[bounds[1:] - 1]))
    if all(checksums_size < 0 for *_, checksums_size, _ in tars.values()):
        return scan
    checksums = [_read_sfv(folder / _sfv(name), of_shard) for name, of_shard in zip(tars, listed, strict=True)]
    return replace(scan, checksums=np.array(list(itertools.chain.from_iterable(checksums)), np.int64)[found.order])


def check_members(scan: ShardScan, folder: Path, samples: NDArray[np.int64] | None = None) -> None:
    """Compare the tar headers of the given images with the indices; by default, all headers and all checksums.

    Raises:
        OSError: a tar cannot be read.
    """
    check_content = samples is None
    samples = np.arange(len(scan.labels)) if samples is None else samples
    numbers = scan.numbers[samples]
    parts = [samples[numbers == number] for number in np.unique(numbers)]
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(lambda part: _check_shard(scan, folder, part, check_content), parts):
            pass


def _check_shard(scan: ShardScan, folder: Path, samples: NDArray[np.int64], check_content: bool) -> None:
    tar = folder / shard_name(int(scan.numbers[samples[0]]))
    with tar.open("rb") as file:
        for sample in samples.tolist():
            name = scan.paths[sample].tobytes().rstrip(b"\0")
            offset, size, checksum = (int(array[sample]) for array in (scan.offsets, scan.sizes, scan.checksums))
            if _name_and_size(os.pread(file.fileno(), BLOCK, offset - BLOCK)) != (name, size):
                raise UserError(f"{tar}: {os.fsdecode(name)} is not where {_idx(tar.name)} says; copy both again, or "
                                f"rebuild the index: `wds2idx {tar} {tar.with_suffix('.idx')}`")  # fmt: skip
            file.seek(offset)
            if check_content and checksum not in (NO_CHECKSUM, zlib.crc32(file.read(size))):
                raise UserError(f"{tar}: {os.fsdecode(name)}: its bytes have changed (they do not have their CRC-32); "
                                "copy the shard again, or pack the data again")  # fmt: skip


def _name_and_size(header: bytes) -> tuple[bytes, int] | None:
    """Parse the name and size of a tar member from its header (POSIX ustar); return None if it is not a header."""
    name, prefix = header[:100].rstrip(b"\0"), header[345:500].rstrip(b"\0")
    try:
        return (prefix + b"/" + name if prefix else name), int(header[124:135], 8)
    except ValueError:
        return None


def _read_manifest(file: Path) -> tuple[list[tuple[int, int]], bool]:
    """Return the number of images and the size in bytes of each shard, and whether the shards have checksums."""
    try:
        if file.exists() and not file.is_file():
            raise ValueError("a FIFO, socket or device")
        manifest = json.loads(file.read_text())
        shards, checksums = manifest["shards"], manifest.get(CHECKSUMS)
        if not all(type(number) is int and number >= 0 for shard in shards for number in shard):
            raise ValueError("not counts")
        if checksums not in (None, CRC32):
            raise ValueError("unknown checksums")
        return [(images, size) for images, size in shards], checksums is not None
    except FileNotFoundError as error:
        raise UserError(f"{file}: missing, so shards may be missing too; copy it, or pack the data again") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: damaged; copy it again, or pack the data again") from error


def _read_idx(tar: Path, images: int, size: int, shard: int) -> list[_Member]:
    file = tar.with_suffix(".idx")
    header, *lines = file.read_bytes().split(b"\n")
    try:
        if header != b"%b %d" % (IDX_VERSION, images) or len(lines) != images + 1 or lines.pop():
            raise ValueError(f"expected {images:,} images in version 1.2")
        return [_parse_line(line, size, shard) for line in lines]
    except ValueError as error:
        raise UserError(f"{file}: damaged ({error}); copy it again, or rebuild it: `wds2idx {tar} {file}`") from error


def _find_lost_image(tar: Path, images: int, size: int, present: int) -> str | None:
    """Return the first image that a truncated tar does not contain completely; None if its index is damaged."""
    try:
        members = _read_idx(tar, images, size, 0)
    except (OSError, UserError):
        return None
    return next((member.name for member in members if member.offset + member.size > present), None)


def _read_sfv(file: Path, members: list[_Member]) -> list[int]:
    """Return the checksum of each image of a shard."""
    *lines, rest = file.read_bytes().split(b"\n")
    fields = [line.rpartition(b" ") for line in lines]
    names_match = [name for name, _, _ in fields] == [os.fsencode(member.name) for member in members]
    if rest or not names_match or not all(_CHECKSUM.fullmatch(checksum) for _, _, checksum in fields):
        raise UserError(
            f"{file}: damaged (expected the images of {file.stem}.idx); copy it again, or pack the data again"
        )
    return [int(checksum, 16) for _, _, checksum in fields]


def _parse_line(line: bytes, tar_size: int, shard: int) -> _Member:
    try:
        extension, start, length, encoded, cls, _, _, _ = line.split(b" ")
        if not (start.isdigit() and length.isdigit()):  # int() also accepts signs and underscores
            raise ValueError("not a number")
        offset, size, name = int(start), int(length), os.fsdecode(encoded)
    except ValueError as error:
        raise ValueError(f"{line[:80]!r} is not an image and its label") from error
    in_tar = BLOCK <= offset <= tar_size - size
    if cls != b"cls" or not encoded.endswith(b"." + extension) or offset % BLOCK or not in_tar:
        raise ValueError(f"{line[:80]!r} is not an image and its label")
    if not is_member_name(name):
        raise ValueError(f"refused: {name!r} is not CLASS/IMAGE")
    return _Member(name, size, offset, shard)


def is_member_name(name: str) -> bool:
    """Return whether a name is that of a file in a class folder or in a folder below it."""
    folders = name.split("/")
    return len(folders) > 1 and "\0" not in name and not any(part in ("", ".", "..") for part in folders)


def _idx(tar: str) -> str:
    return tar.removesuffix(".tar") + ".idx"


def _sfv(tar: str) -> str:
    return tar.removesuffix(".tar") + ".sfv"

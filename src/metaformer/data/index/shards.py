"""Images packed into shards: WebDataset tars, read in place by the byte ranges that their indices list.

SPLIT/shard-000000.tar, shard-000001.tar, ... hold CLASS/NAME.EXT and, after each, its label as CLASS/NAME.cls;
shard-000000.idx has a line for each image, in the format that DALI's readers.webdataset takes (wds2idx, version 1.2);
shards.json lists the shards, so that a missing one is missed.
"""

import json
import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from metaformer.data.index.files import THREADS, Images, fingerprint, pad
from metaformer.errors import UserError

MANIFEST = "shards.json"
IDX_VERSION = b"v1.2"
BLOCK = 512  # bytes: a member's header, and what contents are padded to

_SHARD = re.compile(r"shard-\d{6}\.tar")


class Shards(NamedTuple):
    """Where packed images lie.

    Attributes:
        names: tars in the split's folder.
        numbers: int64 [N], positions in `names`.
        offsets: int64 [N], where an image's bytes begin in its tar.
    """

    names: tuple[str, ...]
    numbers: NDArray[np.int64]
    offsets: NDArray[np.int64]


class _Member(NamedTuple):
    """A line of an index."""

    name: str
    size: int
    offset: int
    shard: int


@dataclass(frozen=True)
class ShardScan(Images):
    """Images that lie in shards, in the order and with the labels of the folder that they were packed from.

    Attributes:
        tars: each shard in order: number of images, size, time of change, and the index's size and time of change;
            bytes and nanoseconds.
        numbers, offsets: int64 [N], as in `Shards`.
    """

    ARRAYS: ClassVar = ("paths", "labels", "sizes", "numbers", "offsets")

    tars: dict[str, list[int]]
    numbers: NDArray[np.int64]
    offsets: NDArray[np.int64]


class ShardSource:
    """A split whose images are in shards.

    Raises:
        UserError: see `list_shards`.
    """

    kind: ClassVar = ShardScan

    def __init__(self, folder: Path) -> None:
        self._folder, self._tars = folder, list_shards(folder)

    @property
    def expected(self) -> dict[str, Any]:
        """Attributes that a cached scan must have."""
        return {"tars": self._tars}

    def is_current(self, cached: ShardScan, check_all: bool) -> bool:
        """Return True: `expected` tells a stale scan. `check_all` compares every image with its tar.

        Raises:
            UserError: a tar holds something else.
        """
        if check_all:
            check_members(cached, self._folder)
        return True

    def scan(self, check_all: bool = False) -> ShardScan:
        """Read all shards' indices."""
        found = scan_shards(self._folder, self._tars)
        if check_all:
            check_members(found, self._folder)
        return found


def shard_name(number: int) -> str:
    """A shard's file name."""
    return f"shard-{number:06}.tar"


def holds_shards(folder: Path) -> bool:
    """Whether a split's folder is one of shards."""
    if not folder.is_dir():
        return False
    with os.scandir(folder) as entries:
        return any(entry.name == MANIFEST or _SHARD.fullmatch(entry.name) for entry in entries)


def list_shards(folder: Path) -> dict[str, list[int]]:
    """The shards of a folder, as `ShardScan.tars`.

    Raises:
        UserError: one that shards.json lists is missing, cut short or without its index, or there is something else.
        OSError: the folder cannot be read.
    """
    listed = _read_manifest(folder / MANIFEST)
    there = {entry.name: entry for entry in os.scandir(folder) if not entry.name.startswith(".")}
    tars = {}
    for number, (images, size) in enumerate(listed):
        name = shard_name(number)
        for file in (name, _idx(name)):
            if file not in there:
                raise UserError(f"{folder / file}: missing; {MANIFEST} lists {len(listed)} shards, copy them again")
        tar, idx = there[name].stat(), there[_idx(name)].stat()
        if not stat.S_ISREG(tar.st_mode) or not stat.S_ISREG(idx.st_mode):
            raise UserError(f"{folder / name}: it or its index is no file (a FIFO, socket or device); copy both again")
        if tar.st_size != size:
            raise UserError(f"{folder / name}: cut short or changed: {tar.st_size:,} bytes, not the {size:,} that "
                            f"{MANIFEST} lists; copy it again")  # fmt: skip
        tars[name] = [images, size, tar.st_mtime_ns, idx.st_size, idx.st_mtime_ns]
    strange = [name for name in there if (_SHARD.fullmatch(name) and name not in tars) or there[name].is_dir()]
    if strange:
        raise UserError(f"{folder / min(strange)}: lies among shards, and {MANIFEST} does not list it; remove it")
    return tars


def scan_shards(folder: Path, tars: dict[str, list[int]]) -> ShardScan:
    """Read the shards' indices, and compare the first and last image of each shard with its tar.

    Raises:
        UserError: an index is damaged or not that of its tar.
    """
    members: list[_Member] = []
    for number, (name, (images, size, *_)) in enumerate(tars.items()):
        members += _read_idx(folder / name, images, size, number)
    if not members:
        raise UserError(f"{folder}: its shards hold no image; pack the data again")
    members.sort(key=lambda member: (member.name.split("/")[0], os.path.split(member.name)))
    classes = sorted({member.name.split("/")[0] for member in members})
    place = {name: label for label, name in enumerate(classes)}
    labels, sizes, offsets, numbers = np.ascontiguousarray(
        np.array([(place[m.name.split("/")[0]], m.size, m.offset, m.shard) for m in members], np.int64).T
    )
    paths = pad([os.fsencode(member.name) for member in members])
    (twice,) = np.nonzero((paths[1:] == paths[:-1]).all(1))
    if len(twice):
        raise UserError(f"{folder}: {members[twice[0]].name!r} is in it twice; make the shards again")
    digest = fingerprint(tuple(classes), paths, sizes)
    found = ShardScan(tuple(classes), paths, labels, sizes, digest, tars, numbers, offsets)
    order = np.lexsort((offsets, numbers))
    ends = np.flatnonzero(np.diff(numbers[order], prepend=-1, append=len(tars)))
    check_members(found, folder, np.union1d(order[ends[:-1]], order[ends[1:] - 1]))
    return found


def check_members(scan: ShardScan, folder: Path, samples: NDArray[np.int64] | None = None) -> None:
    """Compare the headers in the tars with the indices, of some images or of all.

    Raises:
        UserError: the tar holds another file, or another size, where its index names an image.
        OSError: a tar cannot be read.
    """
    samples = np.arange(len(scan.labels)) if samples is None else samples
    numbers = scan.numbers[samples]
    parts = [samples[numbers == number] for number in np.unique(numbers)]
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(lambda part: _check_shard(scan, folder, part), parts):
            pass


def _check_shard(scan: ShardScan, folder: Path, samples: NDArray[np.int64]) -> None:
    tar = folder / shard_name(int(scan.numbers[samples[0]]))
    with tar.open("rb") as file:
        for sample in samples.tolist():
            name = scan.paths[sample].tobytes().rstrip(b"\0")
            header = os.pread(file.fileno(), BLOCK, int(scan.offsets[sample]) - BLOCK)
            if _name_and_size(header) != (name, int(scan.sizes[sample])):
                raise UserError(f"{tar}: {os.fsdecode(name)} is not where {_idx(tar.name)} says; copy both again, or "
                                f"make the index again: `wds2idx {tar} {tar.with_suffix('.idx')}`")  # fmt: skip


def _name_and_size(header: bytes) -> tuple[bytes, int] | None:
    """Of a member, from its header (POSIX ustar); None where it is none."""
    name, prefix = header[:100].rstrip(b"\0"), header[345:500].rstrip(b"\0")
    try:
        return (prefix + b"/" + name if prefix else name), int(header[124:135], 8)
    except ValueError:
        return None


def _read_manifest(file: Path) -> list[tuple[int, int]]:
    """Images and bytes of each shard."""
    try:
        if file.exists() and not file.is_file():
            raise ValueError("a FIFO, socket or device")
        listed = json.loads(file.read_text())["shards"]
        if not all(type(number) is int and number >= 0 for shard in listed for number in shard):
            raise ValueError("not counts")
        return [(images, size) for images, size in listed]
    except FileNotFoundError as error:
        raise UserError(f"{file}: missing, so shards beside it may be; copy it too, or pack the data again") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{file}: damaged; copy it again, or pack the data again") from error


def _read_idx(tar: Path, images: int, size: int, shard: int) -> list[_Member]:
    file = tar.with_suffix(".idx")
    header, *lines = file.read_bytes().split(b"\n")
    try:
        if header != b"%b %d" % (IDX_VERSION, images) or len(lines) != images + 1 or lines.pop():
            raise ValueError(f"not {images:,} images in version 1.2")
        return [_parse_line(line, size, shard) for line in lines]
    except ValueError as error:
        raise UserError(
            f"{file}: damaged ({error}); copy it again, or make it again: `wds2idx {tar} {file}`"
        ) from error


def _parse_line(line: bytes, end: int, shard: int) -> _Member:
    try:
        extension, start, length, encoded, cls, _, _, _ = line.split(b" ")
        if not (start.isdigit() and length.isdigit()):  # int() takes signs and underscores too
            raise ValueError("no number")
        offset, size, name = int(start), int(length), os.fsdecode(encoded)
    except ValueError as error:
        raise ValueError(f"{line[:80]!r} is not an image and its label") from error
    if cls != b"cls" or not encoded.endswith(b"." + extension) or offset % BLOCK or not BLOCK <= offset <= end - size:
        raise ValueError(f"{line[:80]!r} is not an image and its label")
    if not is_member_name(name):
        raise ValueError(f"refused: {name!r} is not CLASS/IMAGE")
    return _Member(name, size, offset, shard)


def is_member_name(name: str) -> bool:
    """Whether a name is that of a file below a class folder, in it or in folders below it."""
    folders = name.split("/")
    return len(folders) > 1 and "\0" not in name and not any(part in ("", ".", "..") for part in folders)


def _idx(tar: str) -> str:
    return tar.removesuffix(".tar") + ".idx"

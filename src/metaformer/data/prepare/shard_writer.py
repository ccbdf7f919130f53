"""Parallel writer of shards, in the layout that `shards` reads.

Each shard is written atomically, then its checksums and its index, and shards.json when all shards exist; repeating
an interrupted call writes what is missing. Equal images give byte-identical shards.
"""

import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from metaformer.data.index.files import sorting_key
from metaformer.data.index.shards import BLOCK, CHECKSUMS, CRC32, IDX_VERSION, MANIFEST, is_member_name, shard_name
from metaformer.data.prepare.processes import ProgressCallback
from metaformer.data.prepare.reencoding import reduce_source_image
from metaformer.data.prepare.source_images import SourceImage, read_source_images
from metaformer.data.prepare.work_plan import cannot_write, check_same_plan, finish_plan, run_tasks, split_by_size
from metaformer.errors import UserError
from metaformer.files import fsync, remove_temporaries, temporary_beside, write_text_atomically

_WHITESPACE = re.compile(rb"[ \t\n\v\f\r]")
_SHORT = 90  # bytes of a name that always fits in a tar header


@dataclass(frozen=True)
class Packing:
    """Settings for packing images into shards.

    Attributes:
        shard_bytes: maximum size of a shard before images are reduced; a single larger image gets its own shard.
        max_side: length in pixels to which the longer side of larger images is reduced; None to keep all images.
        quality: JPEG quality of reduced images.
    """

    shard_bytes: int = 256 * 10**6
    max_side: int | None = None
    quality: int = 90

    @property
    def keeps_images(self) -> bool:
        """Whether all images are stored unchanged."""
        return self.max_side is None


class _Task(NamedTuple):
    """A shard to write."""

    tar: Path
    sources: list[SourceImage]
    labels: dict[str, int]
    packing: Packing


def write_shards(
    sources: list[SourceImage], folder: Path, packing: Packing, pool: Executor, report: ProgressCallback
) -> list[SourceImage]:
    """Pack images into shards in `folder`; return the images in the order in which they were packed.

    If this fails, the work done so far is kept.
    """
    sources = sorted(sources, key=lambda source: sorting_key(source.name))
    _check_names(sources)
    labels = {name: label for label, name in enumerate(sorted({source.class_name for source in sources}))}
    shards = enumerate(split_by_size(sources, packing.shard_bytes, _packed_bytes))
    tasks = [_Task(folder / shard_name(number), shard, labels, packing) for number, shard in shards]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_same_plan(folder, [repr(packing), *(f"{source.name} {source.size}" for source in sources)])
        images = 0

        def report_shard(task: _Task) -> None:
            nonlocal images
            images += len(task.sources)
            report(f"packing {folder.name}", images, len(sources))

        written = run_tasks(write_shard, tasks, pool, report_shard)
        counts_and_sizes = [[len(task.sources), size] for task, size in zip(tasks, written, strict=True)]
        write_text_atomically(folder / MANIFEST, json.dumps({"shards": counts_and_sizes, CHECKSUMS: CRC32}))
        finish_plan(folder)
    except OSError as error:
        raise cannot_write(folder, error) from error
    return sources


def write_shard(task: _Task) -> int:
    """Write a shard, its index and its checksums, unless all exist; return the size of the shard in bytes."""
    files = [task.tar.with_suffix(suffix) for suffix in (".tar", ".sfv", ".idx")]  # in the order of their renaming
    tar, sfv, idx = files
    if all(file.exists() for file in files):
        return tar.stat().st_size
    temporaries = {file: temporary_beside(file) for file in files}
    try:
        with temporaries[tar].open("wb") as file:
            lines = list(_write_members(file, task))
            file.write(bytes(2 * BLOCK))  # end of the tar
        temporaries[idx].write_bytes(b"".join([b"%b %d\n" % (IDX_VERSION, len(lines)), *(line for line, _ in lines)]))
        temporaries[sfv].write_bytes(b"".join(checksum for _, checksum in lines))
        for path, temporary in temporaries.items():
            fsync(temporary)
            temporary.rename(path)
    except OSError as error:
        if not all(file.exists() for file in files):  # otherwise another process has just written the same shard
            raise cannot_write(tar, error) from error
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)
    for path in temporaries:
        remove_temporaries(path)
    return tar.stat().st_size


def _write_members(file: BinaryIO, task: _Task) -> Iterator[tuple[bytes, bytes]]:
    """Append each image and its label; yield its line of the index and of the checksums."""
    packing = task.packing
    for source, content in read_source_images(task.sources):
        if packing.max_side is not None:
            content = reduce_source_image(source, content, packing.max_side, packing.quality)
        label = str(task.labels[source.class_name]).encode()
        line = _append(file, source.name, content) + b" " + _append(file, _label_name(source.name), label) + b"\n"
        yield line, b"%b %08x\n" % (os.fsencode(source.name), zlib.crc32(content))


def _append(file: BinaryIO, name: str, content: bytes) -> bytes:
    """Write a member; return its part of an index line: extension, offset, size, name."""
    file.write(_header(name, len(content)))
    extension, offset = name.rpartition(".")[2], file.tell()
    file.write(content + bytes(-len(content) % BLOCK))
    return b" ".join([os.fsencode(extension), b"%d %d" % (offset, len(content)), os.fsencode(name)])


def _header(name: str, size: int) -> bytes:
    """Return a member's tar header, which does not depend on the time or the user."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = size, 0o644
    return entry.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape")


def _label_name(name: str) -> str:
    return name.rpartition(".")[0] + ".cls"


def _packed_bytes(source: SourceImage) -> int:
    """Return the size of an image in a shard in bytes: two headers, the label and the image."""
    return 3 * BLOCK + -(-source.size // BLOCK) * BLOCK


def _check_names(sources: list[SourceImage]) -> None:
    """Raise an error for names that readers of WebDataset would misinterpret."""
    seen: set[str] = set()
    for name, *_ in sources:
        label = _label_name(name)
        if not is_member_name(name):
            raise UserError(f"refused: {name!r} is not CLASS/IMAGE")
        if _WHITESPACE.search(os.fsencode(name)) or name.rpartition("/")[2].count(".") != 1:
            problem = "shards require names without spaces and with exactly one dot"
        elif label in seen:
            problem = "shards require names that differ in more than the extension"
        elif len(os.fsencode(name)) > _SHORT and not _fits_in_header(label):
            problem = "its name is too long for a shard"
        else:
            seen.add(label)
            continue
        raise UserError(f"{name!r}: {problem}; rename it, or use --format folders")


def _fits_in_header(label: str) -> bool:
    try:
        return bool(_header(f"{label}.jpeg", 0))  # as long as the image's name, or longer
    except ValueError:
        return False

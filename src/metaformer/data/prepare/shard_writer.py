"""Packing images into shards, in the layout that `shards` reads, on all cores.

A shard appears when it is whole, its index after it, and shards.json when all are there; the same call again makes what
is missing. Equal images give equal shards, byte for byte.
"""

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterator
from concurrent.futures import Executor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from metaformer.data.index.shards import BLOCK, IDX_VERSION, MANIFEST, is_member_name, shard_name
from metaformer.data.prepare.pieces import Piece, read_pieces
from metaformer.data.prepare.processes import Report
from metaformer.data.prepare.reencoding import reduce_piece
from metaformer.errors import UserError
from metaformer.files import fsync, remove_temporaries, temporary_beside, write_text_atomically

_WHITESPACE = re.compile(rb"[ \t\n\v\f\r]")
_SHORT = 90  # bytes of a name that certainly fits


@dataclass(frozen=True)
class Packing:
    """How images are packed.

    Attributes:
        shard_bytes: what a shard has at most, before images are reduced, unless one image is larger.
        max_side: images with a longer side are reduced to this, in pixels.
        quality: of the JPEGs that are made then.
    """

    shard_bytes: int = 256 * 10**6
    max_side: int | None = None
    quality: int = 90


class _Task(NamedTuple):
    """A shard to be written."""

    tar: Path
    pieces: list[Piece]
    labels: dict[str, int]
    packing: Packing


def write_shards(pieces: list[Piece], folder: Path, packing: Packing, pool: Executor, report: Report) -> list[Piece]:
    """Make `folder` of these images; returns them in the order in which it has them.

    Raises:
        UserError: an image cannot be read, or has a name that does not go into a shard; or the disk is full; or the
            folder was begun with other images, or another packing. What was done so far is kept.
    """
    pieces = sorted(pieces, key=lambda piece: (piece.class_name, os.path.split(piece.name)))
    _check_names(pieces)
    labels = {name: label for label, name in enumerate(sorted({piece.class_name for piece in pieces}))}
    runs = enumerate(_cut(pieces, packing.shard_bytes))
    tasks = [_Task(folder / shard_name(number), run, labels, packing) for number, run in runs]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_same_plan(folder, pieces, packing)
        futures = {pool.submit(write_shard, task): number for number, task in enumerate(tasks)}
        written, images = [0] * len(tasks), 0
        for future in as_completed(futures):
            number = futures[future]
            written[number] = future.result()
            images += len(tasks[number].pieces)
            report(f"packing {folder.name}", images, len(pieces))
        shards = [[len(task.pieces), size] for task, size in zip(tasks, written, strict=True)]
        write_text_atomically(folder / MANIFEST, json.dumps({"shards": shards}))
        _plan(folder).unlink(missing_ok=True)  # another process may have done the same work
    except OSError as error:
        raise _cannot_write(folder, error) from error
    return pieces


def write_shard(task: _Task) -> int:
    """Write a shard and its index, unless they are there; returns the shard's bytes.

    Raises:
        UserError: as `write_shards`; what was there stays.
    """
    tar, idx = task.tar, task.tar.with_suffix(".idx")
    if tar.exists() and idx.exists():
        return tar.stat().st_size
    temporaries = {file: temporary_beside(file) for file in (tar, idx)}
    try:
        with temporaries[tar].open("wb") as file:
            lines = list(_write_members(file, task))
            file.write(bytes(2 * BLOCK))  # the end of a tar
        temporaries[idx].write_bytes(b"".join([b"%b %d\n" % (IDX_VERSION, len(lines)), *lines]))
        for path, temporary in temporaries.items():
            fsync(temporary)
            temporary.rename(path)
    except OSError as error:
        if not (tar.exists() and idx.exists()):  # else another process has just written the same
            raise _cannot_write(tar, error) from error
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)
    for path in temporaries:
        remove_temporaries(path)
    return tar.stat().st_size


def _write_members(file: BinaryIO, task: _Task) -> Iterator[bytes]:
    """Append each image and its label; gives the index's lines."""
    packing = task.packing
    for piece, content in read_pieces(task.pieces):
        if packing.max_side is not None:
            content = reduce_piece(piece, content, packing.max_side, packing.quality)
        label = str(task.labels[piece.class_name]).encode()
        yield _append(file, piece.name, content) + b" " + _append(file, _label_name(piece.name), label) + b"\n"


def _append(file: BinaryIO, name: str, content: bytes) -> bytes:
    """Write a member; gives its part of the index's line: extension, offset, size, name."""
    file.write(_header(name, len(content)))
    extension, offset = name.rpartition(".")[2], file.tell()
    file.write(content + bytes(-len(content) % BLOCK))
    return b" ".join([os.fsencode(extension), b"%d %d" % (offset, len(content)), os.fsencode(name)])


def _header(name: str, size: int) -> bytes:
    """Of a member, the same whenever and by whomever it is written."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = size, 0o644
    return entry.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape")


def _label_name(name: str) -> str:
    return name.rpartition(".")[0] + ".cls"


def _cut(pieces: list[Piece], shard_bytes: int) -> Iterator[list[Piece]]:
    """Runs that fill a shard each."""
    run: list[Piece] = []
    room = shard_bytes
    for piece in pieces:
        taken = 3 * BLOCK + -(-piece.size // BLOCK) * BLOCK  # two headers and the label
        if run and taken > room:
            yield run
            run, room = [], shard_bytes
        run.append(piece)
        room -= taken
    yield run


def _check_names(pieces: list[Piece]) -> None:
    """Refuse what WebDataset's readers would take for something else."""
    seen: set[str] = set()
    for name, *_ in pieces:
        label = _label_name(name)
        if not is_member_name(name):
            raise UserError(f"refused: {name!r} is not CLASS/IMAGE")
        if _WHITESPACE.search(os.fsencode(name)) or name.rpartition("/")[2].count(".") != 1:
            why = "shards need names without spaces and with one dot"
        elif label in seen:
            why = "shards need names that differ in more than what follows the dot"
        elif len(os.fsencode(name)) > _SHORT and not _fits(label):
            why = "its name is too long for a shard"
        else:
            seen.add(label)
            continue
        raise UserError(f"{name!r}: {why}; rename it, or give --format folders")


def _fits(label: str) -> bool:
    try:
        return bool(_header(f"{label}.jpeg", 0))  # as long as the image's name, or longer
    except ValueError:
        return False


def _check_same_plan(folder: Path, pieces: list[Piece], packing: Packing) -> None:
    digest = hashlib.sha256(repr(packing).encode())
    for piece in pieces:
        digest.update(b"%b %d\n" % (os.fsencode(piece.name), piece.size))
    plan = _plan(folder)
    if plan.exists() and plan.read_bytes() != digest.hexdigest().encode():
        raise UserError(f"{folder.parent}: was begun from other images or with other options; repeat that command, or "
                        "remove it")  # fmt: skip
    write_text_atomically(plan, digest.hexdigest())


def _plan(folder: Path) -> Path:
    """Says, until all is there, what is being made."""
    return folder / "plan.sha256"


def _cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be written ({error.strerror or error}); the same command goes on from here")

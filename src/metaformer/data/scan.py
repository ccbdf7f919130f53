"""Reading the class folders of a split: which images there are, in an order that never changes."""

import hashlib
import os
import stat
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from metaformer.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
SPOT_CHECKS = 1000  # files looked at where not all are
# Folders that storage and archivers put among the data, with thumbnails or deleted images in them.
SYSTEM_FOLDERS = ("@eaDir", "#recycle", "#snapshot", "__MACOSX", "lost+found")
THREADS = 32  # a shared file system answers each question slowly, and many at once


@dataclass(frozen=True)
class Images:
    """The images of a split, by class and name.

    Attributes:
        classes: names, sorted.
        paths: uint8 [N, L], CLASS/IMAGE below the split's folder, padded with NUL.
        labels, sizes: int64 [N]; sizes in bytes.
        fingerprint: SHA-256 over classes, paths and sizes: equal for a copy elsewhere.
    """

    classes: tuple[str, ...]
    paths: NDArray[np.uint8]
    labels: NDArray[np.int64]
    sizes: NDArray[np.int64]
    fingerprint: str


@dataclass(frozen=True)
class Scan(Images):
    """Images that are files.

    Attributes:
        folders: every folder that was read, below the split's, with its time of change in nanoseconds.
        passed_over: how many files are no images by their names, by suffix.
        changed: int64 [N], the files' times of change in nanoseconds.
    """

    ARRAYS: ClassVar = ("paths", "labels", "sizes", "changed")

    folders: dict[str, int]
    passed_over: dict[str, int]
    changed: NDArray[np.int64]


@dataclass
class _Walk:
    """What was met on the way through the folders."""

    folders: dict[str, int] = field(default_factory=dict)
    passed_over: Counter[str] = field(default_factory=Counter)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is none of the data: hidden, or of the storage's own."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def fingerprint(classes: tuple[str, ...], paths: NDArray[np.uint8], sizes: NDArray[np.int64]) -> str:
    """As `Images.fingerprint`."""
    digest = hashlib.sha256("\0".join(classes).encode(errors="surrogateescape"))
    digest.update(np.ascontiguousarray(paths).data)
    digest.update(np.ascontiguousarray(sizes).data)
    return digest.hexdigest()


def describe_passed_over(counts: dict[str, int]) -> str:
    """Files that are no images by their names, in words, the most frequent kinds first."""
    ordered = sorted(counts.items(), key=lambda kind: (-kind[1], kind[0]))
    kinds = [f"{count:,} {suffix or 'without suffix'}" for suffix, count in ordered]
    more = f" and {len(kinds) - 8} kinds more" if len(kinds) > 8 else ""
    return ", ".join(kinds[:8]) + more


def scan(folder: Path, classes: list[str]) -> Scan:
    """Read the class folders, and the folders below them.

    Raises:
        UserError: one holds no image, or something that is named as an image and is no file.
    """
    names: list[bytes] = []
    numbers: list[tuple[int, int]] = []  # size and time of change
    counts: list[int] = []
    walk = _Walk()
    for name in classes:
        others = walk.passed_over.copy()
        images = sorted(_images_below(folder, name, walk), key=lambda image: os.path.split(image[0]))
        if not images:
            found = describe_passed_over(walk.passed_over - others)
            but = f", but {found}; images are {' '.join(EXTENSIONS)}" if found else ""
            raise UserError(
                f"data.root: class folder {(folder / name).absolute()} holds no image{but}; fill or remove it"
            )
        names.extend(os.fsencode(path) for path, _, _ in images)
        numbers.extend((size, changed) for _, size, changed in images)
        counts.append(len(images))
    sizes, changed = np.ascontiguousarray(np.array(numbers, np.int64).T)
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), counts)
    paths = pad(names)
    digest = fingerprint(tuple(classes), paths, sizes)
    return Scan(tuple(classes), paths, labels, sizes, digest, walk.folders, dict(walk.passed_over), changed)


def pad(names: list[bytes]) -> NDArray[np.uint8]:
    """Names as the rows of an array, as long as the longest."""
    length = max(map(len, names))
    return np.frombuffer(b"".join(name.ljust(length, b"\0") for name in names), np.uint8).reshape(len(names), length)


def is_current(scan: Scan, folder: Path, check_all_files: bool) -> bool:
    """Whether all folders that were scanned, and all files or some, have the times and sizes of then."""
    if any((folder / name).stat().st_mtime_ns != changed for name, changed in scan.folders.items()):
        return False
    count = len(scan.labels)
    checks = count if check_all_files else min(count, SPOT_CHECKS)
    parts = np.array_split(np.linspace(0, count - 1, checks).astype(np.int64), THREADS)
    with ThreadPoolExecutor(THREADS) as pool:
        return all(pool.map(lambda part: _are_unchanged(scan, folder, part), parts))


def _are_unchanged(scan: Scan, folder: Path, samples: NDArray[np.int64]) -> bool:
    prefix, length = os.fsencode(folder) + b"/", scan.paths.shape[1]
    names = scan.paths[samples].tobytes()
    expected = zip(scan.sizes[samples].tolist(), scan.changed[samples].tolist(), strict=True)
    for number, size_and_time in enumerate(expected):
        status = os.stat(prefix + names[number * length : (number + 1) * length].rstrip(b"\0"))  # noqa: PTH116
        if (status.st_size, status.st_mtime_ns) != size_and_time:
            return False
    return True


def _images_below(folder: Path, below: str, walk: _Walk) -> list[tuple[str, int, int]]:
    found: list[tuple[str, int, int]] = []
    walk.folders[below] = (folder / below).stat().st_mtime_ns  # before it is read
    with os.scandir(folder / below) as entries:
        for entry in entries:
            path = f"{below}/{entry.name}"
            if is_hidden(entry.name):
                continue
            if entry.is_dir():
                found.extend(_images_below(folder, path, walk))
            elif entry.name.lower().endswith(EXTENSIONS):
                status = entry.stat()
                if not stat.S_ISREG(status.st_mode):
                    raise UserError(
                        f"data.root: {folder / path} is named as an image but is a FIFO, socket or device; remove it"
                    )
                found.append((path, status.st_size, status.st_mtime_ns))
            elif below != ".":  # the folder of a data set without classes may hold anything
                walk.passed_over[os.path.splitext(entry.name)[1].lower()] += 1  # noqa: PTH122
    return found

"""Reading the class folders of a split: which images there are, in an order that never changes."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from metaformer.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
SPOT_CHECKS = 1000  # files looked at where not all are
THREADS = 32  # a shared file system answers each question slowly, and many at once


@dataclass(frozen=True)
class Images:
    """The images of a split, by class and name.

    Attributes:
        classes: names, sorted.
        paths: uint8 [N, L], CLASS/IMAGE below the split's folder, padded with NUL.
        labels, sizes: int64 [N]; sizes in bytes.
    """

    classes: tuple[str, ...]
    paths: NDArray[np.uint8]
    labels: NDArray[np.int64]
    sizes: NDArray[np.int64]

    def fingerprint(self) -> str:
        """SHA-256 over classes, paths and sizes: equal for a copy elsewhere."""
        digest = hashlib.sha256("\0".join(self.classes).encode(errors="surrogateescape"))
        digest.update(self.paths.tobytes())
        digest.update(self.sizes.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Scan(Images):
    """Images that are files.

    Attributes:
        folders: every folder that was read, below the split's, with its time of change in nanoseconds.
        changed: int64 [N], the files' times of change in nanoseconds.
    """

    ARRAYS: ClassVar = ("paths", "labels", "sizes", "changed")

    folders: dict[str, int]
    changed: NDArray[np.int64]


def scan(folder: Path, classes: list[str]) -> Scan:
    """Read the class folders, and the folders below them.

    Raises:
        UserError: one holds no image.
    """
    names: list[bytes] = []
    numbers: list[tuple[int, int]] = []  # size and time of change
    counts: list[int] = []
    folders: dict[str, int] = {}
    for name in classes:
        images = sorted(_images_below(folder, name, folders), key=lambda image: os.path.split(image[0]))
        if not images:
            raise UserError(f"data.root: class folder {(folder / name).absolute()} holds no image; fill or remove it")
        names.extend(os.fsencode(path) for path, _, _ in images)
        numbers.extend((size, changed) for _, size, changed in images)
        counts.append(len(images))
    sizes, changed = np.ascontiguousarray(np.array(numbers, np.int64).T)
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), counts)
    return Scan(tuple(classes), pad(names), labels, sizes, folders, changed)


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
        stat = os.stat(prefix + names[number * length : (number + 1) * length].rstrip(b"\0"))  # noqa: PTH116
        if (stat.st_size, stat.st_mtime_ns) != size_and_time:
            return False
    return True


def _images_below(folder: Path, below: str, folders: dict[str, int]) -> list[tuple[str, int, int]]:
    found: list[tuple[str, int, int]] = []
    folders[below] = (folder / below).stat().st_mtime_ns  # before it is read
    with os.scandir(folder / below) as entries:
        for entry in entries:
            path = f"{below}/{entry.name}"
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                found.extend(_images_below(folder, path, folders))
            elif entry.name.lower().endswith(EXTENSIONS):
                stat = entry.stat()
                found.append((path, stat.st_size, stat.st_mtime_ns))
    return found

"""Reading the class folders of a split: which images there are, in an order that never changes."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from metaformer.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Scan:
    """The images of a split, by class and name.

    Attributes:
        classes: class folder names, sorted.
        folders: every folder that was read, below the split's, with its time of change in nanoseconds.
        paths: uint8 [N, L], below the split's folder, padded with NUL.
        labels, sizes, changed: int64 [N]; sizes in bytes, times of change in nanoseconds.
    """

    classes: tuple[str, ...]
    folders: dict[str, int]
    paths: NDArray[np.uint8]
    labels: NDArray[np.int64]
    sizes: NDArray[np.int64]
    changed: NDArray[np.int64]

    def fingerprint(self) -> str:
        """SHA-256 over classes, paths and sizes: equal for a copy elsewhere."""
        digest = hashlib.sha256("\0".join(self.classes).encode(errors="surrogateescape"))
        digest.update(self.paths.tobytes())
        digest.update(self.sizes.tobytes())
        return digest.hexdigest()


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
    length = max(map(len, names))
    paths = np.frombuffer(b"".join(n.ljust(length, b"\0") for n in names), np.uint8).reshape(len(names), length)
    sizes, changed = np.ascontiguousarray(np.array(numbers, np.int64).T)
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), counts)
    return Scan(tuple(classes), folders, paths, labels, sizes, changed)


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

"""Reading the class folders of a split: which images there are, in an order that never changes."""

import hashlib
import os
import stat
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

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

    ARRAYS: ClassVar[tuple[str, ...]] = ("paths", "labels", "sizes")


@dataclass(frozen=True)
class FileScan(Images):
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


class FileSource:
    """A split whose images are files in class folders.

    Raises:
        UserError: the split's folder is missing or holds no class folder.
    """

    kind: ClassVar = FileScan

    def __init__(self, root: Path, split: str) -> None:
        self._folder = root / split
        self._classes = _list_class_folders(root, split)

    @property
    def expected(self) -> dict[str, Any]:
        """Attributes that a cached scan must have."""
        return {"classes": self._classes}

    def is_current(self, cached: FileScan, check_all: bool) -> bool:
        """Return whether all scanned folders, and some or all files, have the times and sizes of the scan."""
        return _is_current(cached, self._folder, check_all)

    def scan(self, check_all: bool = False) -> FileScan:
        """Read all class folders."""
        return scan_files(self._folder, self._classes)


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


def scan_files(folder: Path, classes: list[str]) -> FileScan:
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
    return FileScan(tuple(classes), paths, labels, sizes, digest, walk.folders, dict(walk.passed_over), changed)


def pad(names: list[bytes]) -> NDArray[np.uint8]:
    """Names as the rows of an array, as long as the longest."""
    length = max(map(len, names))
    return np.frombuffer(b"".join(name.ljust(length, b"\0") for name in names), np.uint8).reshape(len(names), length)


def _is_current(scan: FileScan, folder: Path, check_all_files: bool) -> bool:
    """Whether all folders that were scanned, and all files or some, have the times and sizes of then."""
    if any((folder / name).stat().st_mtime_ns != changed for name, changed in scan.folders.items()):
        return False
    count = len(scan.labels)
    checks = count if check_all_files else min(count, SPOT_CHECKS)
    parts = np.array_split(np.linspace(0, count - 1, checks).astype(np.int64), THREADS)
    with ThreadPoolExecutor(THREADS) as pool:
        return all(pool.map(lambda part: _are_unchanged(scan, folder, part), parts))


def _are_unchanged(scan: FileScan, folder: Path, samples: NDArray[np.int64]) -> bool:
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


def _list_class_folders(root: Path, split: str) -> list[str]:
    folder = root / split
    if not folder.is_dir():
        raise UserError(f"data.root={root}: no folder {folder.absolute()}; {_expected_layout(split)}")
    with os.scandir(folder) as entries:
        listing = [(e.name, e.is_dir()) for e in entries if not is_hidden(e.name)]
    classes = sorted(name for name, is_dir in listing if is_dir)
    if not classes:
        what = "images lie in it without class folders" if listing else "it is empty"
        raise UserError(f"data.root={root}: {folder.absolute()} is not a data set: {what}; {_expected_layout(split)}")
    return classes


def _expected_layout(split: str) -> str:
    if split == ".":
        return "data.root must hold the class folders: CLASS/*.JPEG below it; see docs/data.md"
    return (
        f"expected {split}/CLASS/*.JPEG below data.root; "
        "prepare ImageNet with `python scripts/prepare_data.py imagenet --help`, or try data=sample"
    )

"""Scan of a split stored as class folders; images are listed in a fixed order."""

import hashlib
import os
import re
import stat
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from metaformer.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
SPOT_CHECKS = 1000  # number of files that a quick check examines
# Folders that storage systems and archivers create among the data; they may contain thumbnails or deleted images.
SYSTEM_FOLDERS = ("@eaDir", "#recycle", "#snapshot", "__MACOSX", "lost+found")
THREADS = 32  # a shared file system answers each request slowly, but serves many at once


@dataclass(frozen=True)
class SplitScan:
    """The images found in a split, ordered by class and name.

    Attributes:
        classes: class names, sorted.
        paths: uint8 [N, L], CLASS/IMAGE below the split's folder, padded with NUL.
        labels: int64 [N].
        sizes: int64 [N], in bytes.
        fingerprint: SHA-256 over classes, paths and sizes; the same for a copy of the data elsewhere.
    """

    classes: tuple[str, ...]
    paths: NDArray[np.uint8]
    labels: NDArray[np.int64]
    sizes: NDArray[np.int64]
    fingerprint: str

    ARRAYS: ClassVar[tuple[str, ...]] = ("paths", "labels", "sizes")


@dataclass(frozen=True)
class FileScan(SplitScan):
    """The scan of a split stored as files.

    Attributes:
        folders: modification time in nanoseconds of every folder that was read, by path below the split's folder.
        passed_over: number of skipped files, which have no image suffix, by suffix.
        changed: int64 [N], modification times of the files in nanoseconds.
    """

    ARRAYS: ClassVar = ("paths", "labels", "sizes", "changed")

    folders: dict[str, int]
    passed_over: dict[str, int]
    changed: NDArray[np.int64]


@dataclass
class _Walk:
    """Folders and skipped files seen while walking a split; fields as in `FileScan`."""

    folders: dict[str, int] = field(default_factory=dict)
    passed_over: Counter[str] = field(default_factory=Counter)


class FileSource:
    """A split stored as image files in class folders."""

    scan_type: ClassVar = FileScan

    def __init__(self, root: Path, split: str) -> None:
        self._folder = root / split
        self._classes = _list_class_folders(root, split)

    @property
    def expected(self) -> dict[str, Any]:
        """Attribute values that a cached scan must have."""
        return {"classes": self._classes}

    def is_current(self, cached: FileScan, check_all: bool) -> bool:
        """Return whether all folders, and some or all files, still have the times and sizes of the scan."""
        return _is_current(cached, self._folder, check_all)

    def scan(self, check_all: bool = False) -> FileScan:
        """Read all class folders."""
        return scan_files(self._folder, self._classes)


def holds_packed(folder: Path, manifest: str, file: re.Pattern[str]) -> bool:
    """Return whether a split's folder has a manifest of packed images, or a packed file by its name."""
    if not folder.is_dir():
        return False
    with os.scandir(folder) as entries:
        return any(entry.name == manifest or file.fullmatch(entry.name) for entry in entries)


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is not part of the data: hidden, or created by the storage system."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def fingerprint(classes: tuple[str, ...], paths: NDArray[np.uint8], sizes: NDArray[np.int64]) -> str:
    """Return `SplitScan.fingerprint`."""
    digest = hashlib.sha256("\0".join(classes).encode(errors="surrogateescape"))
    digest.update(np.ascontiguousarray(paths).data)
    digest.update(np.ascontiguousarray(sizes).data)
    return digest.hexdigest()


def describe_passed_over(counts: dict[str, int]) -> str:
    """Describe the counts of skipped files by suffix, most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{count:,} {suffix or 'without suffix'}" for suffix, count in ordered]
    more = f" and {len(parts) - 8} more suffixes" if len(parts) > 8 else ""
    return ", ".join(parts[:8]) + more


def scan_files(folder: Path, classes: list[str]) -> FileScan:
    """Scan the class folders and all folders below them."""
    names: list[bytes] = []
    sizes_and_times: list[tuple[int, int]] = []
    counts: list[int] = []
    walk = _Walk()
    for name in classes:
        passed_over_before = walk.passed_over.copy()
        images = sorted(_images_below(folder, name, walk), key=lambda image: os.path.split(image[0]))
        if not images:
            found = describe_passed_over(walk.passed_over - passed_over_before)
            but = f", only {found}; image suffixes are {' '.join(EXTENSIONS)}" if found else ""
            raise UserError(
                f"data.root: class folder {(folder / name).absolute()} contains no images{but}; fill or remove it"
            )
        names.extend(os.fsencode(path) for path, _, _ in images)
        sizes_and_times.extend((size, changed) for _, size, changed in images)
        counts.append(len(images))
    sizes, changed = np.ascontiguousarray(np.array(sizes_and_times, np.int64).T)
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), counts)
    paths = pad(names)
    digest = fingerprint(tuple(classes), paths, sizes)
    return FileScan(tuple(classes), paths, labels, sizes, digest, walk.folders, dict(walk.passed_over), changed)


class Arrangement(NamedTuple):
    """Images in the order of an index: by class, folder and name.

    Attributes:
        order: positions in the list of names that was given.
        classes, paths, labels: as in `SplitScan`.
    """

    order: list[int]
    classes: tuple[str, ...]
    paths: NDArray[np.uint8]
    labels: NDArray[np.int64]


def arrange(names: list[str], folder: Path) -> Arrangement:
    """Sort the images of shards, named CLASS/IMAGE, in the order of class folders."""
    order = sorted(range(len(names)), key=lambda position: sorting_key(names[position]))
    classes = sorted({name.partition("/")[0] for name in names})
    label_of = {name: label for label, name in enumerate(classes)}
    labels = np.array([label_of[names[position].partition("/")[0]] for position in order], np.int64)
    paths = pad([os.fsencode(names[position]) for position in order])
    (duplicates,) = np.nonzero((paths[1:] == paths[:-1]).all(1))
    if len(duplicates):
        raise UserError(f"{folder}: {names[order[duplicates[0]]]!r} occurs twice; pack the data again")
    return Arrangement(order, tuple(classes), paths, labels)


def sorting_key(name: str) -> tuple[str, tuple[str, str]]:
    """Return the key by which images are sorted: class, folder below it, file name."""
    return name.partition("/")[0], os.path.split(name)


def pad(names: list[bytes]) -> NDArray[np.uint8]:
    """Return the names as uint8 [N, L], each padded with NUL to the length L of the longest."""
    length = max(map(len, names))
    return np.frombuffer(b"".join(name.ljust(length, b"\0") for name in names), np.uint8).reshape(len(names), length)


def _is_current(scan: FileScan, folder: Path, check_all_files: bool) -> bool:
    """Return whether all scanned folders, and all files or a sample of them, have their recorded times and sizes."""
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
    for row, size_and_time in enumerate(expected):
        status = os.stat(prefix + names[row * length : (row + 1) * length].rstrip(b"\0"))  # noqa: PTH116
        if (status.st_size, status.st_mtime_ns) != size_and_time:
            return False
    return True


def _images_below(folder: Path, below: str, walk: _Walk) -> list[tuple[str, int, int]]:
    """List the path below `folder`, size and modification time of every image below `folder/below`."""
    found: list[tuple[str, int, int]] = []
    walk.folders[below] = (folder / below).stat().st_mtime_ns  # before reading, so that a later change is detected
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
                        f"data.root: {folder / path} has an image suffix but is a FIFO, socket or device; remove it"
                    )
                found.append((path, status.st_size, status.st_mtime_ns))
            elif below != ".":  # a folder of images without classes may contain anything
                walk.passed_over[os.path.splitext(entry.name)[1].lower()] += 1  # noqa: PTH122
    return found


def check_split_folder(root: Path, split: str) -> Path:
    """Return the folder of a split, or raise an error that says what data.root should be."""
    folder = root / split
    if not folder.is_dir():
        raise UserError(f"data.root={root}: no folder {folder.absolute()}; {_probably_meant(root, split)}")
    return folder


def _list_class_folders(root: Path, split: str) -> list[str]:
    folder = check_split_folder(root, split)
    with os.scandir(folder) as entries:
        listing = [(e.name, e.is_dir()) for e in entries if not is_hidden(e.name)]
    classes = sorted(name for name, is_dir in listing if is_dir)
    if not classes:
        problem = "it contains no class folders" if listing else "it is empty"
        raise UserError(
            f"data.root={root}: {folder.absolute()} is not a data set: {problem}; {_expected_layout(split)}"
        )
    return classes


def _probably_meant(root: Path, split: str) -> str:
    """Return advice for a data.root without the folder `split`: the folder above or below that has it, if one does."""
    if split != "." and root.is_dir():
        above = [folder for folder in root.absolute().parents[:2] if (folder / split).is_dir()]
        if above:
            return f"this is a folder inside a data set; use data.root={above[0]}"
        folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not is_hidden(entry.name))
        below = [name for name in folders if (root / name / split).is_dir()]
        if below:
            return f"the data set is a folder below; use data.root={root / below[0]}"
        other = [name for name in folders if name.lower() in ("valid", "validation", "val", "test", "testing", "dev")]
        if other and split != "train":
            return f"if {other[0]} is the validation split, add data.val_split={other[0]}"
    return _expected_layout(split)


def _expected_layout(split: str) -> str:
    if split == ".":
        return "data.root must contain the class folders (CLASS/*.JPEG); see docs/data.md"
    return (
        f"expected {split}/CLASS/*.JPEG below data.root; "
        "prepare ImageNet with `python scripts/prepare_data.py imagenet --help`, or try data=sample"
    )

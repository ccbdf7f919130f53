"""A scan kept on disk, and whether it is still true.

PLACE/SPLIT.json says what was scanned, and which folder beside it holds the arrays. They are memory-mapped: all ranks
and workers of a node share them. PLACE lies beside the data, or in the user's cache folder where the data is read-only.
"""

import hashlib
import json
import os
import secrets
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from metaformer.data.scan import Scan
from metaformer.files import write_text_whole

FORMAT = 3
ARRAYS = ("paths", "labels", "sizes", "changed")
SPOT_CHECKS = 1000  # files looked at where not all are
THREADS = 32  # a shared file system answers each question slowly, and many at once


def load_scan(root: Path, split: str, classes: list[str], check_all_files: bool) -> Scan | None:
    """The kept scan of `root/split`, unless the class folders, a folder in them or a file has changed since.

    Args:
        classes: class folders that are there now.
        check_all_files: compare every file's size and time of change, not only those of some.
    """
    for place in _places(root):
        try:
            known = json.loads(_description(place, split).read_text())
            expected = {"format": FORMAT, "folder": str((root / split).resolve()), "classes": classes}
            if {name: known[name] for name in expected} != expected:
                continue
            scan = _map(tuple(classes), known["folders"], place / known["arrays"])
            if _is_current(scan, root / split, check_all_files):
                return scan
        except (OSError, ValueError, EOFError, KeyError, TypeError):
            continue  # missing or damaged
    return None


def store_scan(scan: Scan, root: Path, split: str) -> Scan:
    """Keep a scan in the first place that can be written; returns it memory-mapped, or as it was where none can."""
    for place in _places(root):
        arrays = f"{_name(split)}-{secrets.token_hex(4)}"
        try:
            (place / arrays).mkdir(parents=True)
            for name in ARRAYS:
                np.save(place / arrays / f"{name}.npy", getattr(scan, name))
            description: dict[str, Any] = {"format": FORMAT, "folder": str((root / split).resolve())}
            description |= {"classes": scan.classes, "folders": scan.folders, "arrays": arrays}
            write_text_whole(_description(place, split), json.dumps(description))
            for old in place.glob(f"{_name(split)}-????????"):
                if old.name != arrays:
                    shutil.rmtree(old, ignore_errors=True)
            return _map(scan.classes, scan.folders, place / arrays)
        except OSError:  # read-only or full: the next place; without any the scan is repeated, nothing is lost
            shutil.rmtree(place / arrays, ignore_errors=True)
    return scan


def _map(classes: tuple[str, ...], folders: dict[str, int], arrays: Path) -> Scan:
    paths, labels, sizes, changed = (open_memmap(arrays / f"{name}.npy", mode="r") for name in ARRAYS)
    return Scan(classes, folders, paths, labels, sizes, changed)


def _is_current(scan: Scan, folder: Path, check_all_files: bool) -> bool:
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


def _places(root: Path) -> list[Path]:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metaformer"
    return [root / ".metaformer", home / hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]]


def _name(split: str) -> str:
    return "all" if split == "." else split.replace("/", "-")


def _description(place: Path, split: str) -> Path:
    return place / f"{_name(split)}.json"

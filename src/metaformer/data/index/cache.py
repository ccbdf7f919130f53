"""On-disk cache of data set scans.

CACHE/SPLIT.json describes the scan and names the folder next to it with the arrays. The arrays are memory-mapped,
so all ranks and workers of a node share them. A digest over the description and the arrays detects a damaged cache.
CACHE is a folder next to the data, or in the user's cache folder if the data is read-only.
"""

import hashlib
import json
import secrets
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.lib.format import open_memmap

from metaformer.data.index.files import SplitScan
from metaformer.files import cache_folder, write_text_atomically

FORMAT = 6


class ImageSource(Protocol):
    """A split on disk, stored as files or as shards."""

    scan_type: ClassVar[Any]

    @property
    def expected(self) -> dict[str, Any]:
        """Attribute values that a cached scan must have to be current."""

    def is_current(self, cached: Any, check_all: bool) -> bool:
        """Return whether a cached scan still describes the images; `check_all` checks every image."""

    def scan(self, check_all: bool) -> SplitScan:
        """Read the names and sizes of the images from disk."""


def load_or_scan(
    source: ImageSource, root: Path, split: str, check_all: bool, report: Callable[[str], None]
) -> SplitScan:
    """Return the cached scan of `root/split` if it is current; otherwise scan the split and cache the result.

    Args:
        check_all: check every image instead of a sample.
        report: called with a message if the cache is damaged; the cache is then ignored.
    """
    cached = _load(source, root, split, check_all, report)
    return _store(source.scan(check_all), root, split) if cached is None else cached


def _load(
    source: ImageSource, root: Path, split: str, check_all: bool, report: Callable[[str], None]
) -> SplitScan | None:
    scan_type = source.scan_type
    for folder in _cache_folders(root):
        file = _description_file(folder, split)
        try:
            description = json.loads(file.read_text())
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError):
            description = None
        expected = {**_origin(scan_type, root, split), **source.expected}
        if isinstance(description, dict) and (description.get("format"), description.get("kind")) != (
            FORMAT,
            scan_type.__name__,
        ):
            continue
        if not isinstance(description, dict) or not _is_intact(scan_type, description, folder):
            report(f"{file}: the index cache is damaged; scanning the data set again")
            continue
        if {name: description[name] for name in expected} != expected:
            continue
        try:
            scan = _map(scan_type, description, folder / description["arrays"])
            if source.is_current(scan, check_all):
                return scan
        except OSError:  # a scanned file no longer exists
            continue
    return None


def _store(scan: SplitScan, root: Path, split: str) -> SplitScan:
    """Cache a scan in the first writable folder and return it memory-mapped; return it as is if there is none."""
    for folder in _cache_folders(root):
        arrays = f"{_name(split)}-{secrets.token_hex(4)}"
        try:
            (folder / arrays).mkdir(parents=True)
            for name in scan.ARRAYS:
                np.save(folder / arrays / f"{name}.npy", getattr(scan, name))
            description = {**_origin(type(scan), root, split), "arrays": arrays}
            description |= {name: getattr(scan, name) for name in _metadata_fields(type(scan))}
            description["digest"] = _digest(type(scan), description, folder / arrays)
            write_text_atomically(_description_file(folder, split), json.dumps(description))
            for old in folder.glob(f"{_name(split)}-????????"):
                if old.name != arrays:
                    shutil.rmtree(old, ignore_errors=True)
            return _map(type(scan), description, folder / arrays)
        except OSError:  # read-only or full: try the next folder; without a cache the next start only scans again
            shutil.rmtree(folder / arrays, ignore_errors=True)
    return scan


def _is_intact(scan_type: type[SplitScan], description: dict[str, Any], folder: Path) -> bool:
    """Return whether the description and the arrays have their digest. Nothing is interpreted before this check."""
    try:
        arrays = folder / str(description["arrays"])
        return bool(description["digest"] == _digest(scan_type, description, arrays))
    except (OSError, ValueError, KeyError):
        return False


def _digest(scan_type: type[SplitScan], description: dict[str, Any], arrays: Path) -> str:
    digest = hashlib.sha256(json.dumps({**description, "digest": None}, sort_keys=True).encode())
    for name in scan_type.ARRAYS:
        digest.update(np.memmap(arrays / f"{name}.npy", np.uint8, "r").data)
    return digest.hexdigest()


def _origin(scan_type: type[SplitScan], root: Path, split: str) -> dict[str, Any]:
    return {"format": FORMAT, "kind": scan_type.__name__, "folder": str((root / split).resolve())}


def _metadata_fields(scan_type: type[SplitScan]) -> list[str]:
    """Return the attributes that are not arrays."""
    return [field.name for field in fields(scan_type) if field.name not in scan_type.ARRAYS]


def _map(scan_type: type[SplitScan], description: dict[str, Any], arrays: Path) -> SplitScan:
    values = {name: description[name] for name in _metadata_fields(scan_type)}
    values |= {name: open_memmap(arrays / f"{name}.npy", mode="r") for name in scan_type.ARRAYS}
    return scan_type(**{**values, "classes": tuple(values["classes"])})


def _cache_folders(root: Path) -> list[Path]:
    return [root / ".metaformer", cache_folder() / hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]]


def _name(split: str) -> str:
    return "all" if split == "." else split.replace("/", "-")


def _description_file(folder: Path, split: str) -> Path:
    return folder / f"{_name(split)}.json"

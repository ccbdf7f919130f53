"""A scan kept on disk, for the next start.

PLACE/SPLIT.json says what was scanned, and which folder beside it holds the arrays. They are memory-mapped: all ranks
and workers of a node share them. A digest over all of it tells a damaged cache. PLACE lies beside the data, or in the
user's cache folder where the data is read-only.
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

from metaformer.data.index.files import Images
from metaformer.files import cache_folder, write_text_atomically

FORMAT = 5


class ImageSource(Protocol):
    """Where the images of a split are: in files or in shards."""

    kind: ClassVar[Any]  # the type of its scans

    @property
    def expected(self) -> dict[str, Any]:
        """Attributes that a cached scan must have to be current."""

    def is_current(self, cached: Any, check_all: bool) -> bool:
        """Return whether a cached scan still describes the images; `check_all` looks at every one of them."""

    def scan(self, check_all: bool) -> Images:
        """Read the images' names and sizes anew."""


def load_or_scan(source: ImageSource, root: Path, split: str, check_all: bool, report: Callable[[str], None]) -> Images:
    """Return the cached scan of `root/split` if it is current, else scan and cache the result.

    Args:
        check_all: look at every image, not only at some of them.
        report: receives a line about a damaged cache, which is then ignored.
    """
    cached = _load(source, root, split, check_all, report)
    return _store(source.scan(check_all), root, split) if cached is None else cached


def _load(source: ImageSource, root: Path, split: str, check_all: bool, report: Callable[[str], None]) -> Images | None:
    kind = source.kind
    for place in _places(root):
        file = _description(place, split)
        try:
            known = json.loads(file.read_text())
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError):
            known = None
        wanted = {**_origin(kind, root, split), **source.expected}
        if isinstance(known, dict) and (known.get("format"), known.get("kind")) != (FORMAT, kind.__name__):
            continue
        if not isinstance(known, dict) or not _is_whole(kind, known, place):
            report(f"{file}: the index's cache was damaged; the data set is scanned anew")
            continue
        if {name: known[name] for name in wanted} != wanted:
            continue
        try:
            scan = _map(kind, known, place / known["arrays"])
            if source.is_current(scan, check_all):
                return scan
        except OSError:  # a file that was scanned is gone
            continue
    return None


def _store(scan: Images, root: Path, split: str) -> Images:
    """Cache a scan in the first writable place; return it memory-mapped, or as it was if there is none."""
    for place in _places(root):
        arrays = f"{_name(split)}-{secrets.token_hex(4)}"
        try:
            (place / arrays).mkdir(parents=True)
            for name in scan.ARRAYS:
                np.save(place / arrays / f"{name}.npy", getattr(scan, name))
            description = {**_origin(type(scan), root, split), "arrays": arrays}
            description |= {name: getattr(scan, name) for name in _described(type(scan))}
            description["digest"] = _digest(type(scan), description, place / arrays)
            write_text_atomically(_description(place, split), json.dumps(description))
            for old in place.glob(f"{_name(split)}-????????"):
                if old.name != arrays:
                    shutil.rmtree(old, ignore_errors=True)
            return _map(type(scan), description, place / arrays)
        except OSError:  # read-only or full: the next place; without any the scan is repeated, nothing is lost
            shutil.rmtree(place / arrays, ignore_errors=True)
    return scan


def _is_whole(kind: type[Images], known: dict[str, Any], place: Path) -> bool:
    """Whether the description and the arrays are as they were written; nothing of them is interpreted before."""
    try:
        arrays = place / str(known["arrays"])
        return bool(known["digest"] == _digest(kind, known, arrays))
    except (OSError, ValueError, KeyError):
        return False


def _digest(kind: type[Images], description: dict[str, Any], arrays: Path) -> str:
    digest = hashlib.sha256(json.dumps({**description, "digest": None}, sort_keys=True).encode())
    for name in kind.ARRAYS:
        digest.update(np.memmap(arrays / f"{name}.npy", np.uint8, "r").data)
    return digest.hexdigest()


def _origin(kind: type[Images], root: Path, split: str) -> dict[str, Any]:
    return {"format": FORMAT, "kind": kind.__name__, "folder": str((root / split).resolve())}


def _described(kind: type[Images]) -> list[str]:
    """Attributes that are no arrays."""
    return [field.name for field in fields(kind) if field.name not in kind.ARRAYS]


def _map(kind: type[Images], known: dict[str, Any], arrays: Path) -> Images:
    values = {name: known[name] for name in _described(kind)}
    values |= {name: open_memmap(arrays / f"{name}.npy", mode="r") for name in kind.ARRAYS}
    return kind(**{**values, "classes": tuple(values["classes"])})


def _places(root: Path) -> list[Path]:
    return [root / ".metaformer", cache_folder() / hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]]


def _name(split: str) -> str:
    return "all" if split == "." else split.replace("/", "-")


def _description(place: Path, split: str) -> Path:
    return place / f"{_name(split)}.json"

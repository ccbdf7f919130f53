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
from typing import Any, TypeVar

import numpy as np
from numpy.lib.format import open_memmap

from metaformer.data.scan import Scan
from metaformer.data.shards import ShardScan
from metaformer.files import cache_folder, write_text_whole

FORMAT = 5

Kept = TypeVar("Kept", Scan, ShardScan)


def load_scan(
    kind: type[Kept],
    root: Path,
    split: str,
    expected: dict[str, Any],
    is_current: Callable[[Kept], bool],
    tell: Callable[[str], None],
) -> Kept | None:
    """The kept scan of `root/split`, if it has the `expected` attributes and `is_current` says so.

    Args:
        tell: gets a line about a cache that is damaged, and so not used.
    """
    for place in _places(root):
        file = _description(place, split)
        try:
            known = json.loads(file.read_text())
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError):
            known = None
        wanted = {**_origin(kind, root, split), **expected}
        if isinstance(known, dict) and (known.get("format"), known.get("kind")) != (FORMAT, kind.__name__):
            continue
        if not isinstance(known, dict) or not _is_whole(kind, known, place):
            tell(f"{file}: the index's cache was damaged; the data set is scanned anew")
            continue
        if {name: known[name] for name in wanted} != wanted:
            continue
        try:
            scan = _map(kind, known, place / known["arrays"])
            if is_current(scan):
                return scan
        except OSError:  # a file of then is gone
            continue
    return None


def store_scan(scan: Kept, root: Path, split: str) -> Kept:
    """Keep a scan in the first place that can be written; returns it memory-mapped, or as it was where none can."""
    for place in _places(root):
        arrays = f"{_name(split)}-{secrets.token_hex(4)}"
        try:
            (place / arrays).mkdir(parents=True)
            for name in scan.ARRAYS:
                np.save(place / arrays / f"{name}.npy", getattr(scan, name))
            description = {**_origin(type(scan), root, split), "arrays": arrays}
            description |= {name: getattr(scan, name) for name in _described(type(scan))}
            description["digest"] = _digest(type(scan), description, place / arrays)
            write_text_whole(_description(place, split), json.dumps(description))
            for old in place.glob(f"{_name(split)}-????????"):
                if old.name != arrays:
                    shutil.rmtree(old, ignore_errors=True)
            return _map(type(scan), description, place / arrays)
        except OSError:  # read-only or full: the next place; without any the scan is repeated, nothing is lost
            shutil.rmtree(place / arrays, ignore_errors=True)
    return scan


def _is_whole(kind: type[Kept], known: dict[str, Any], place: Path) -> bool:
    """Whether the description and the arrays are as they were written; nothing of them is interpreted before."""
    try:
        arrays = place / str(known["arrays"])
        return bool(known["digest"] == _digest(kind, known, arrays))
    except (OSError, ValueError, KeyError):
        return False


def _digest(kind: type[Kept], description: dict[str, Any], arrays: Path) -> str:
    digest = hashlib.sha256(json.dumps({**description, "digest": None}, sort_keys=True).encode())
    for name in kind.ARRAYS:
        digest.update(np.memmap(arrays / f"{name}.npy", np.uint8, "r").data)
    return digest.hexdigest()


def _origin(kind: type[Kept], root: Path, split: str) -> dict[str, Any]:
    return {"format": FORMAT, "kind": kind.__name__, "folder": str((root / split).resolve())}


def _described(kind: type[Kept]) -> list[str]:
    """Attributes that are no arrays."""
    return [field.name for field in fields(kind) if field.name not in kind.ARRAYS]


def _map(kind: type[Kept], known: dict[str, Any], arrays: Path) -> Kept:
    values = {name: known[name] for name in _described(kind)}
    values |= {name: open_memmap(arrays / f"{name}.npy", mode="r") for name in kind.ARRAYS}
    return kind(**{**values, "classes": tuple(values["classes"])})


def _places(root: Path) -> list[Path]:
    return [root / ".metaformer", cache_folder() / hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]]


def _name(split: str) -> str:
    return "all" if split == "." else split.replace("/", "-")


def _description(place: Path, split: str) -> Path:
    return place / f"{_name(split)}.json"

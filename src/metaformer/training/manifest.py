"""The manifest of a checkpoint: its content, and the hash of each file."""

import hashlib
import importlib.metadata
import json
import time
from pathlib import Path
from typing import Any

from metaformer.errors import UserError, one_line
from metaformer.files import null_where_not_finite, sha256, to_json

MANIFEST_FILE = "manifest.json"
FORMAT = 2
PACKAGES = ("torch", "timm", "numpy", "safetensors")


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Write the manifest of the files in a folder.

    Args:
        facts: further entries, such as network, identity, progress, ranks and configuration.
    """
    files = {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in sorted(folder.iterdir())}
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    manifest: dict[str, Any] = null_where_not_finite(
        {"format": FORMAT, "saved_at": time.time(), **facts, "versions": versions, "files": files}
    )
    manifest["digest"] = _digest(manifest)
    (folder / MANIFEST_FILE).write_text(to_json(manifest, indent=2) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint.

    Raises:
        UserError: the manifest is missing, damaged, or of another format.
    """
    file = folder / MANIFEST_FILE
    try:
        manifest: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        reason = one_line(error)
        raise UserError(f"{file}: damaged or missing ({reason}); is this a checkpoint?") from error
    known = {"format", "saved_at", "model", "identity", "progress", "files"}
    if not isinstance(manifest, dict) or not known <= manifest.keys() or manifest["format"] != FORMAT:
        raise UserError(
            f"{file}: not a manifest of format {FORMAT}; the checkpoint is damaged, or written by another version"
        )
    return manifest


def verify(folder: Path) -> dict[str, Any]:
    """Compare the manifest of a checkpoint with its digest, and every file with the manifest; return the manifest.

    Raises:
        UserError: names the first file that is missing or differs from what was written.
    """
    manifest = read_manifest(folder)
    if manifest.get("digest") != _digest(manifest):
        raise UserError(f"{folder / MANIFEST_FILE}: damaged: its digest does not match its content")
    for name, expected in manifest["files"].items():
        file = folder / name
        try:
            size = file.stat().st_size
            if size != expected["bytes"]:
                raise UserError(f"{file}: damaged: {size:,} bytes, not {expected['bytes']:,} as in the manifest")
            if sha256(file) != expected["sha256"]:
                raise UserError(f"{file}: damaged: its SHA-256 differs from the manifest's")
        except OSError as error:
            raise UserError(f"{file}: missing or not readable ({error.strerror or error})") from error
    return manifest


def _digest(manifest: dict[str, Any]) -> str:
    """Return the SHA-256 of all other entries of a manifest."""
    content = {name: value for name, value in manifest.items() if name != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

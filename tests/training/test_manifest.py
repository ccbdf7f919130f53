"""Test that the manifest detects any changed byte of a checkpoint."""

import json
import math
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from metaformer.errors import UserError
from metaformer.training.manifest import read_manifest, verify, write_manifest

FACTS = {"model": "tiny", "identity": {"seed": 0}, "progress": {"step": 3, "best": {"top1": 12.5}}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with two files and their manifest."""
    (tmp_path / "model.safetensors").write_bytes(bytes(range(64)))
    (tmp_path / "trainer.pt").write_bytes(b"")
    write_manifest(tmp_path, FACTS)
    return tmp_path


def flip(file: Path, position: int) -> None:
    """Flip one bit."""
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def test_content(folder: Path) -> None:
    """The manifest returns the given facts, and lists all files and the versions that wrote them."""
    manifest = verify(folder)
    assert {name: manifest[name] for name in FACTS} == FACTS
    assert {name: facts["bytes"] for name, facts in manifest["files"].items()} == {
        "model.safetensors": 64,
        "trainer.pt": 0,
    }
    assert manifest["versions"]["torch"] == version("torch")
    assert read_manifest(folder) == manifest


def test_figures_that_are_not_finite(tmp_path: Path) -> None:
    """Figures that are not finite are stored as null, and the manifest is valid JSON with a correct digest."""
    facts = {**FACTS, "progress": {"loss": math.nan, "row": [{"top1": math.inf}, -math.inf]}}
    write_manifest(tmp_path, facts)
    assert verify(tmp_path)["progress"] == {"loss": None, "row": [{"top1": None}, None]}


def test_any_byte_of_the_manifest(folder: Path) -> None:
    """A flipped bit in any byte of the manifest gives a one-line error that names it, never wrong content."""
    file = folder / "manifest.json"
    content, written = file.read_bytes(), verify(folder)
    accepted, messages = 0, []
    for position in range(len(content)):
        flip(file, position)
        try:
            assert verify(folder) == written
            accepted += 1
        except UserError as error:
            messages.append(str(error))
        file.write_bytes(content)
    assert all(str(folder) in line and "\n" not in line for line in messages)
    assert accepted <= 1, "a changed 17th digit of a float may parse to the same float"


@pytest.mark.parametrize("position", [0, 31, 63])
def test_any_byte_of_a_file(folder: Path, position: int) -> None:
    """A file with the right size but one flipped bit is named."""
    flip(folder / "model.safetensors", position)
    with pytest.raises(UserError, match=r"model\.safetensors: damaged: its SHA-256 differs from the manifest's"):
        verify(folder)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), r"damaged: 63 bytes, not 64 as in the manifest"),
        (lambda file: file.write_bytes(file.read_bytes() + b"\0"), r"damaged: 65 bytes, not 64 as in the manifest"),
        (lambda file: file.unlink(), r"missing or not readable \(No such file"),
    ],
    ids=["shorter", "longer", "missing"],
)
def test_changed_files(folder: Path, damage: Callable[[Path], object], reason: str) -> None:
    """A file that is truncated, longer or missing is named, with what is wrong."""
    damage(folder / "model.safetensors")
    with pytest.raises(UserError, match=rf"model\.safetensors: {reason}"):
        verify(folder)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "damaged or missing"),
        (b"\xff\xfe", "damaged or missing"),
        (b"[]", "not a manifest of format"),
        (b"{}", "not a manifest of format"),
        (None, r"damaged or missing \(.*No such file"),
    ],
    ids=["empty", "binary", "list", "without-fields", "missing"],
)
def test_not_a_manifest(folder: Path, content: bytes | None, reason: str) -> None:
    """An invalid or missing manifest gives an error that names it."""
    file = folder / "manifest.json"
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=rf"manifest\.json: {reason}"):
        read_manifest(folder)


def test_another_format_is_refused(folder: Path) -> None:
    """A manifest of a later format is refused."""
    file = folder / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))
    with pytest.raises(UserError, match=r"not a manifest of format 2; .* by another version"):
        read_manifest(folder)

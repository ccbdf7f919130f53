"""Test scan_data.py: the manifest, the list of broken files and the report."""

import csv
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from metaformer.data.prepare.scan_images import ScannedImage
from metaformer.errors import UserError
from scripts import scan_data

Scan = Callable[..., tuple[int, str]]


@pytest.fixture
def root(images: Path, tmp_path: Path) -> Path:
    """Return a small data set that the test may modify."""
    shutil.copytree(images / "train", tmp_path / "data" / "train")
    shutil.copytree(images / "train", tmp_path / "data" / "val")
    return tmp_path / "data"


@pytest.fixture
def scan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Scan:
    """Return a function that runs the script and returns its exit code and stdout; stderr must be empty."""

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["scan_data.py", *map(str, arguments), "--workers=1"])
        code = 0
        try:
            scan_data.main()
        except SystemExit as ended:
            code = int(str(ended.code))
        output = capsys.readouterr()
        assert output.err == ""
        return code, output.out

    return run


def break_two(root: Path) -> list[str]:
    cut, empty = root / "train" / "class_1" / "005.JPEG", root / "val" / "class_2" / "002.JPEG"
    cut.write_bytes(cut.read_bytes()[:400])
    empty.write_bytes(b"")
    return ["train/class_1/005.JPEG", "val/class_2/002.JPEG"]


def read_manifest(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.read_text().splitlines()))


def size_of(file: Path) -> tuple[int, int]:
    with Image.open(file) as image:
        return image.size


def test_whole_data_set(root: Path, tmp_path: Path, scan: Scan) -> None:
    """If all files decode, the exit code is 0, the manifest has a row for each file, and the list is empty."""
    Image.new("L", (40, 50)).save(root / "val" / "class_0" / "000.JPEG")
    Image.new("RGB", (60, 50)).save(root / "val" / "class_0" / "004.JPEG", "GIF")
    code, printed = scan(root, "--out", tmp_path / "m.csv", "--quarantine", tmp_path / "q.txt")
    assert code == 0
    assert printed.splitlines()[:2] == [
        f"{root} (train, val): 96 images, 0 cannot be decoded",
        "decodable, but not plain RGB JPEGs: 2",
    ]
    assert "1  gray\n" in printed
    assert "1  GIF named as a JPEG (only the first frame is read)\n" in printed
    assert (tmp_path / "q.txt").read_bytes() == b""
    rows = read_manifest(tmp_path / "m.csv")
    files = [file for split in ("train", "val") for file in sorted((root / split).rglob("*.JPEG"))]
    assert [root / row["path"] for row in rows] == files
    assert [int(row["bytes"]) for row in rows] == [file.stat().st_size for file in files]
    assert [(int(row["width"]), int(row["height"])) for row in rows] == [size_of(file) for file in files]
    assert {row["ok"] for row in rows} == {"1"}


def test_broken_files(root: Path, tmp_path: Path, scan: Scan) -> None:
    """Broken files are in the report, the manifest and the list, and the exit code is 1."""
    broken = break_two(root)
    code, printed = scan(root, "--out", tmp_path / "m.csv", "--quarantine", tmp_path / "q.txt")
    assert code == 1
    assert printed.splitlines()[0] == f"{root} (train, val): 96 images, 2 cannot be decoded"
    assert f"broken: {broken[1]}: empty file" in printed.splitlines()
    assert (tmp_path / "q.txt").read_text().splitlines() == broken
    rows = read_manifest(tmp_path / "m.csv")
    assert [row["path"] for row in rows if row["ok"] == "0" and row["reason"]] == broken


def test_one_split(root: Path, scan: Scan) -> None:
    """--split selects a split, or with "." a root that contains the class folders; paths are relative to the root."""
    broken = break_two(root)
    assert scan(root, "--split", "val")[1].splitlines()[-1] == f"broken: {broken[1]}: empty file"
    code, printed = scan(root / "val", "--split", ".")
    assert code == 1
    assert printed.splitlines()[-1] == "broken: class_2/002.JPEG: empty file"


def refusal(scan: Scan, *arguments: object) -> str:
    with pytest.raises(UserError) as caught:
        scan(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_invalid_input_is_refused(root: Path, tmp_path: Path, scan: Scan) -> None:
    """A missing split, unwritable outputs, bad file names and unreadable files give a one-line error and no output."""
    assert "no folder" in refusal(scan, root, "--split", "test")
    for option in ("--out", "--quarantine"):
        for file in (tmp_path / "none" / "file", tmp_path):
            assert refusal(scan, root, option, file).startswith(f"{option} {file}: cannot be written")
    bad_name = root / "train" / "class_0" / "a\nb.JPEG"
    bad_name.touch()
    assert "line break" in refusal(scan, root, "--quarantine", tmp_path / "q.txt")
    bad_name.unlink()
    (root / "train" / "loop").symlink_to("loop")
    message = refusal(scan, root, "--out", tmp_path / "m.csv")
    assert message.startswith(f"data.root: {root / 'train' / 'loop'} cannot be read (")
    (root / "train" / "loop").rename(root / "train" / "class_0" / "loop.JPEG")
    assert "class_0/loop.JPEG cannot be read (" in refusal(scan, root)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_scan_that_fails_leaves_no_manifest(
    root: Path, tmp_path: Path, scan: Scan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupted scan leaves an existing manifest unchanged and no other files."""
    (tmp_path / "m.csv").write_text("before")
    original_add = scan_data.Summary.add

    def add(summary: scan_data.Summary, image: ScannedImage) -> None:
        original_add(summary, image)
        if summary.images == 60:
            raise KeyboardInterrupt

    monkeypatch.setattr(scan_data.Summary, "add", add)
    with pytest.raises(KeyboardInterrupt):
        scan(root, "--out", tmp_path / "m.csv")
    assert (tmp_path / "m.csv").read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "m.csv"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_folder(root: Path, scan: Scan) -> None:
    """A class folder without read permission gives a one-line error that names it."""
    folder = root / "train" / "class_1"
    folder.chmod(0)
    assert refusal(scan, root).startswith(f"data.root: {folder} cannot be read (Permission denied)")
    folder.chmod(0o755)

"""The benchmark of what is read from the disk."""

import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import pytest

from benchmarks import storage
from benchmarks.storage import main
from metaformer.errors import UserError


def test_what_is_read_from_the_disk(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each file is read once, in whole blocks, although it was in the page cache; the rate gives images per second."""
    folder, file = tmp_path / "train", tmp_path / "found.json"
    shutil.copytree(images / "train", folder)
    monkeypatch.setattr(sys, "argv", ["storage.py", str(folder), "--rate=100", f"--json={file}"])
    try:
        main()
    except UserError as error:
        pytest.skip(str(error))  # the temporary folder is in memory
    (row,) = json.loads(file.read_text())["cases"].values()
    sizes = [path.stat().st_size for path in folder.glob("*/*.JPEG")]
    assert row["stored_bytes"] == pytest.approx(sum(sizes) / len(sizes))
    assert row["stored_bytes"] < row["read_bytes"] < row["stored_bytes"] + 65_536
    assert row["images_per_second"] == pytest.approx(100e6 / row["read_bytes"])
    assert f"{row['read_bytes'] / 1000:.1f}" in capsys.readouterr().out


def test_data_in_memory_is_refused(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that no disk is read for end in one line, not in a division by zero."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        shutil.copytree(images / "train", Path(folder) / "train")
        monkeypatch.setattr(sys, "argv", ["storage.py", f"{folder}/train"])
        with pytest.raises(UserError, match=r"/train: nothing was read from a disk; it is in memory, or "):
            main()


@pytest.mark.whole
def test_a_throttled_disk(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Within the limit, 3 MB take more than two seconds at 1 MB/s; the loader's speed is shown, and no cgroup stays."""
    file, folder = tmp_path / "file", tmp_path / "train"
    file.write_bytes(bytes(3_000_000))
    shutil.copytree(images / "train", folder)
    try:
        with storage._limited_disks([tmp_path], 1), file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            started = time.monotonic()
            opened.read()
            assert time.monotonic() - started > 2
        monkeypatch.setattr(sys, "argv", ["storage.py", str(folder), "--throttle", f"--json={tmp_path / 'found.json'}"])
        main()
    except (UserError, OSError) as error:
        pytest.skip(str(error))  # no such cgroup, or no disk
    (row,) = json.loads((tmp_path / "found.json").read_text())["cases"].values()
    assert f"{row['loader_images_per_second']:.0f}" in capsys.readouterr().out
    assert not list(storage.BLKIO.glob(f"metaformer-storage-{os.getpid()}"))


def test_a_machine_without_the_cgroup_is_refused(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--throttle where the kernel cannot limit a disk ends in one line; it never measures an unlimited disk."""
    monkeypatch.setattr(storage, "BLKIO", tmp_path / "blkio")
    monkeypatch.setattr(storage, "measure", lambda index, rate: {"images_per_second": 1.0})
    monkeypatch.setattr(sys, "argv", ["storage.py", str(images / "train"), "--throttle"])
    with pytest.raises(UserError, match=r"--throttle: .*: No such file or directory; it needs root, and version 1"):
        main()

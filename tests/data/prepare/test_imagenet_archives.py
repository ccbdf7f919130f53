"""Tests of unpacking ImageNet's archives: interruptions, full disks, damaged archives."""

import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from metaformer.data.prepare.imagenet_archives import ClassFolder, Member, make_class_folder, read_members
from metaformer.errors import UserError

CLASSES, IMAGES, BYTES = 30, 20, 200_000


def tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture(scope="module")
def nested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tar of 30 tars of 20 files of 200 kB, 120 MB in total, nested like the training archive."""
    path = tmp_path_factory.mktemp("archive") / "train.tar"
    with tarfile.open(path, "w") as archive:
        for label in range(CLASSES):
            content = tar({f"n{label:08}_{i}.JPEG": bytes([label, i]) * (BYTES // 2) for i in range(IMAGES)})
            entry = tarfile.TarInfo(f"n{label:08}.tar")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


# Does what prepare_data.py does with the training archive, but without the hashes and counts of the real archive.
UNPACK = """
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from metaformer.data.prepare import imagenet_archives as archives
if __name__ == "__main__":
    archive, target = map(Path, sys.argv[1:])
    archives.IMAGES["train"] = 600
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        folders = archives._training_folders(archive, target)
        archives._unpack("train", folders, pool, lambda what, done, total: print(done, flush=True))
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "unpack.py"
    path.write_text(UNPACK)
    return path


def assert_whole(folder: Path) -> None:
    for label in range(CLASSES):
        files = sorted((folder / f"n{label:08}").iterdir())
        assert len(files) == IMAGES
        for file in files:
            image = int(file.stem.split("_")[1])
            assert file.read_bytes() == bytes([label, image]) * (BYTES // 2)
    assert len(list(folder.iterdir())) == CLASSES, "nothing incomplete is left"


def make_all(archive: Path, target: Path) -> None:
    """Make all class folders, one after the other."""
    for member in read_members(archive):
        make_class_folder(ClassFolder(archive, target / Path(member.name).stem, inner=member))


def test_a_killed_unpacking_is_resumed(nested: Path, tmp_path: Path, script: Path) -> None:
    """After SIGKILL, class folders are complete or absent; repeating the command makes only the missing ones."""
    target = tmp_path / "out"
    command = [sys.executable, str(script), str(nested), str(target)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    while not list(target.glob("n*")):
        assert process.poll() is None
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    made = {folder: folder.stat().st_ino for folder in target.glob("n*")}
    assert 0 < len(made) < CLASSES
    assert all(len(list(folder.iterdir())) == IMAGES for folder in made)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=120)
    assert_whole(target)
    assert all(folder.stat().st_ino == inode for folder, inode in made.items())


def test_a_full_disk_is_reported(nested: Path, small_disk: Path) -> None:
    """The folder that does not fit is absent, earlier ones are complete, and the message gives the reason."""
    with pytest.raises(UserError, match=r"n00000002: cannot be written \(No space left on device\); the same command"):
        make_all(nested, small_disk)
    assert sorted(path.name for path in small_disk.iterdir()) == ["n00000000", "n00000001"]


def test_a_damaged_folder_is_made_again(nested: Path, tmp_path: Path) -> None:
    """A class folder with a missing or shorter file is not considered complete."""
    task = ClassFolder(nested, tmp_path / "n00000000", inner=read_members(nested)[0])
    assert make_class_folder(task) == IMAGES
    victim = tmp_path / "n00000000" / "n00000000_3.JPEG"
    for damage in (victim.unlink, lambda: victim.write_bytes(b"short")):
        damage()
        assert make_class_folder(task) == IMAGES
        assert victim.stat().st_size == BYTES


@pytest.mark.parametrize("name", ["../out.JPEG", "/out.JPEG", "folder/out.JPEG", ".hidden"])
def test_members_outside_the_top_level_are_refused(tmp_path: Path, name: str) -> None:
    """A member with a folder in its name, or a hidden name, is rejected, and nothing is written."""
    (tmp_path / "a.tar").write_bytes(tar({"n1_1.JPEG": b"x", name: b"y"}))
    with pytest.raises(UserError, match=r"a\.tar: refused: .* is not a regular file at the top level$"):
        read_members(tmp_path / "a.tar")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_members_that_are_not_files_are_refused(tmp_path: Path, kind: bytes) -> None:
    """Links, devices, pipes and folders are rejected."""
    entry = tarfile.TarInfo("n1_2.JPEG")
    entry.type, entry.linkname = kind, "n1_1.JPEG"
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.addfile(entry)
    with pytest.raises(UserError, match=r"refused: 'n1_2\.JPEG'"):
        read_members(tmp_path / "a.tar")


@pytest.mark.parametrize("keep", [100, 1_000, 61_000_000, -1025])
def test_a_tar_cut_short_is_refused(nested: Path, tmp_path: Path, keep: int) -> None:
    """A tar cut in a header, in a file or between members is named; no class folder of the missing part is made."""
    cut = tmp_path / "cut.tar"
    cut.write_bytes(nested.read_bytes()[:keep] if keep > 0 else nested.read_bytes()[:60_000_000])
    with pytest.raises(UserError, match=r"cut\.tar.*download it again$"):
        make_all(cut, tmp_path)
    assert not (tmp_path / f"n{CLASSES - 1:08}").exists()


def test_an_inner_tar_cut_short_is_refused(tmp_path: Path) -> None:
    """A class's tar whose last file exceeds the tar is rejected by name; the bytes that follow are not read."""
    whole = tar({"n1_1.JPEG": b"x" * 5000})
    (tmp_path / "train.tar").write_bytes(tar({"n1.tar": whole[:2000], "n2.tar": whole}))
    first, second = read_members(tmp_path / "train.tar")
    with pytest.raises(UserError, match=r"train\.tar: n1\.tar: .*download it again$"):
        make_class_folder(ClassFolder(tmp_path / "train.tar", tmp_path / "n1", inner=first))
    assert make_class_folder(ClassFolder(tmp_path / "train.tar", tmp_path / "n2", inner=second)) == 1
    assert not (tmp_path / "n1").exists()


def test_members_have_offsets_in_the_archive(nested: Path) -> None:
    """Offsets refer to the outer archive, so that any process can copy a file."""
    inner = read_members(nested)[7]
    member = read_members(nested, inner)[3]
    assert member == Member("n00000007_3.JPEG", member.offset, BYTES)
    with nested.open("rb") as file:
        file.seek(member.offset)
        assert file.read(BYTES) == bytes([7, 3]) * (BYTES // 2)


def test_a_duplicate_member_is_refused(tmp_path: Path) -> None:
    """tar would use the later member, and the number of images would be wrong."""
    twice = tar({"a.JPEG": b"1"})[:1024] + tar({"b.JPEG": b"2", "a.JPEG": b"3"})
    (tmp_path / "n1.tar").write_bytes(twice)
    with pytest.raises(UserError, match=r"n1\.tar: refused: 'a\.JPEG' occurs twice; download it again$"):
        read_members(tmp_path / "n1.tar")

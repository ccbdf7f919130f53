"""Unpacking ImageNet's archives: interruptions, full disks, archives that are not as they should be."""

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
    """A tar of 30 tars of 20 files of 200 kB, 120 MB in all, as the training archive is nested."""
    path = tmp_path_factory.mktemp("archive") / "train.tar"
    with tarfile.open(path, "w") as archive:
        for label in range(CLASSES):
            content = tar({f"n{label:08}_{i}.JPEG": bytes([label, i]) * (BYTES // 2) for i in range(IMAGES)})
            entry = tarfile.TarInfo(f"n{label:08}.tar")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


# What prepare_data.py does with the training archive, without the hashes and counts of the real one.
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
    assert len(list(folder.iterdir())) == CLASSES, "nothing half-made is left"


def make_all(archive: Path, target: Path) -> None:
    """Each class folder in turn."""
    for member in read_members(archive):
        make_class_folder(ClassFolder(archive, target / Path(member.name).stem, inner=member))


def test_a_killed_unpacking_goes_on(nested: Path, tmp_path: Path, script: Path) -> None:
    """After SIGKILL in the middle, class folders are whole or not there; the same again makes all, and redoes none."""
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


def test_a_full_disk_is_said(nested: Path, small_disk: Path) -> None:
    """The folder that does not fit is not there, those before it are whole, and the message says why."""
    with pytest.raises(UserError, match=r"n00000002: cannot be written \(No space left on device\); the same command"):
        make_all(nested, small_disk)
    assert sorted(path.name for path in small_disk.iterdir()) == ["n00000000", "n00000001"]


def test_a_damaged_folder_is_made_again(nested: Path, tmp_path: Path) -> None:
    """A class folder that lacks a file, or has a shorter one, is not taken for whole."""
    task = ClassFolder(nested, tmp_path / "n00000000", inner=read_members(nested)[0])
    assert make_class_folder(task) == IMAGES
    victim = tmp_path / "n00000000" / "n00000000_3.JPEG"
    for damage in (victim.unlink, lambda: victim.write_bytes(b"short")):
        damage()
        assert make_class_folder(task) == IMAGES
        assert victim.stat().st_size == BYTES


@pytest.mark.parametrize("name", ["../out.JPEG", "/out.JPEG", "folder/out.JPEG", ".hidden"])
def test_members_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    """A member with a folder or a hidden name: refused by its name, nothing is written."""
    (tmp_path / "a.tar").write_bytes(tar({"n1_1.JPEG": b"x", name: b"y"}))
    with pytest.raises(UserError, match=r"a\.tar: refused: .* is not a plain file without a folder$"):
        read_members(tmp_path / "a.tar")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_members_that_are_no_files_are_refused(tmp_path: Path, kind: bytes) -> None:
    """Links, devices, pipes and folders are refused."""
    entry = tarfile.TarInfo("n1_2.JPEG")
    entry.type, entry.linkname = kind, "n1_1.JPEG"
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.addfile(entry)
    with pytest.raises(UserError, match=r"refused: 'n1_2\.JPEG'"):
        read_members(tmp_path / "a.tar")


@pytest.mark.parametrize("keep", [100, 1_000, 61_000_000, -1025])
def test_a_tar_cut_short_is_refused(nested: Path, tmp_path: Path, keep: int) -> None:
    """Cut in a header, in a file, between members: named, and no class folder of the missing part is made."""
    cut = tmp_path / "cut.tar"
    cut.write_bytes(nested.read_bytes()[:keep] if keep > 0 else nested.read_bytes()[:60_000_000])
    with pytest.raises(UserError, match=r"cut\.tar.*get it again$"):
        make_all(cut, tmp_path)
    assert not (tmp_path / f"n{CLASSES - 1:08}").exists()


def test_an_inner_tar_cut_short_is_refused(tmp_path: Path) -> None:
    """A class's tar whose last file reaches beyond its own end is refused by its name, not read from what follows."""
    whole = tar({"n1_1.JPEG": b"x" * 5000})
    (tmp_path / "train.tar").write_bytes(tar({"n1.tar": whole[:2000], "n2.tar": whole}))
    first, second = read_members(tmp_path / "train.tar")
    with pytest.raises(UserError, match=r"train\.tar: n1\.tar: .*get it again$"):
        make_class_folder(ClassFolder(tmp_path / "train.tar", tmp_path / "n1", inner=first))
    assert make_class_folder(ClassFolder(tmp_path / "train.tar", tmp_path / "n2", inner=second)) == 1
    assert not (tmp_path / "n1").exists()


def test_members_know_their_bytes(nested: Path) -> None:
    """Offsets are the outer archive's, so that any process can copy a file."""
    inner = read_members(nested)[7]
    member = read_members(nested, inner)[3]
    assert member == Member("n00000007_3.JPEG", member.offset, BYTES)
    with nested.open("rb") as file:
        file.seek(member.offset)
        assert file.read(BYTES) == bytes([7, 3]) * (BYTES // 2)


def test_a_member_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    """tar would take the later one, and the count of images would be wrong."""
    twice = tar({"a.JPEG": b"1"})[:1024] + tar({"b.JPEG": b"2", "a.JPEG": b"3"})
    (tmp_path / "n1.tar").write_bytes(twice)
    with pytest.raises(UserError, match=r"n1\.tar: refused: 'a\.JPEG' is in it twice; get it again$"):
        read_members(tmp_path / "n1.tar")

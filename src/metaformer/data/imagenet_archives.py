"""ImageNet-1K from the archives of image-net.org to folders, on all cores, without unpacking to anywhere in between.

The archives are plain tars, so an image is a range of bytes that any process can copy: the training archive holds a tar
for each class, the validation archive all images, which the devkit's ground truth sorts into classes. A class folder
appears when it is whole, the data set when all are; the same call again goes on where one was interrupted.
"""

import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import BinaryIO, NamedTuple

from metaformer.errors import UserError
from metaformer.files import write_text_whole

# Published with the archives, on image-net.org's download page.
MD5 = {
    "train": "1d675b47d978889d74fa0da5fadfb00e",
    "val": "29b22e2961454d5413ddabcf34fc5622",
    "devkit": "fa75699e90414af021442c21a62c3abf",
}
IMAGES = {"train": 1_281_167, "val": 50_000}
COPY_BYTES = 1 << 20

Report = Callable[[str, int, int], None]  # what is being done, how much of it is done, of how much


class Archives(NamedTuple):
    """The three files."""

    train: Path
    val: Path
    devkit: Path


class Member(NamedTuple):
    """A file in a tar: a range of the archive's bytes."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class ClassFolder:
    """A class folder to be made from an archive: of the given members, or of all in the tar that a member is."""

    archive: Path
    folder: Path
    members: tuple[Member, ...] = ()
    inner: Member | None = None


def unpack_imagenet(archives: Archives, out: Path, workers: int, report: Report) -> None:
    """Make `out` with train/ and val/ from the archives.

    Args:
        workers: processes.
        report: called as the work goes on.

    Raises:
        UserError: an archive is missing, not the known one, cut short, or holds what does not belong there; or the disk
            is full. What was done so far is kept beside `out`, and `out` does not exist.
    """
    for archive in archives:
        if not archive.is_file():
            raise UserError(f"{archive}: no such file; get it from image-net.org, after signing in")
    partial = out.with_name(f".{out.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            _check_hashes(archives, partial / "hashes.json", pool, report)
            for split, folders in (
                ("train", _training_folders(archives.train, partial / "train")),
                ("val", _validation_folders(archives.val, archives.devkit, partial / "val")),
            ):
                _unpack(split, folders, pool, report)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    os.sync()
    (partial / "hashes.json").unlink()
    partial.rename(out)


def _check_hashes(archives: Archives, known: Path, pool: ProcessPoolExecutor, report: Report) -> None:
    """MD5 of each archive; one that was right before and is unchanged since is not read again."""
    found: dict[str, str] = json.loads(known.read_text()) if known.exists() else {}
    states = {}
    for name, archive in archives._asdict().items():
        stat = archive.stat()
        states[name] = f"{archive.absolute()} {stat.st_size} {stat.st_mtime_ns}"
    pending = {pool.submit(_md5, getattr(archives, name)): name for name in MD5 if states[name] not in found}
    for done, future in enumerate(as_completed(pending), 1):
        name = pending[future]
        if future.result() != MD5[name]:
            raise UserError(
                f"{getattr(archives, name)}: not the known archive (its MD5 is not {MD5[name]}); get it again"
            )
        found[states[name]] = MD5[name]
        write_text_whole(known, json.dumps(found))
        report("checking the archives' hashes", done, len(pending))


def _md5(archive: Path) -> str:
    with archive.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _training_folders(archive: Path, target: Path) -> list[ClassFolder]:
    inner = read_members(archive)
    return [ClassFolder(archive, target / Path(member.name).stem, inner=member) for member in inner]


def _validation_folders(archive: Path, devkit: Path, target: Path) -> list[ClassFolder]:
    wnids = read_validation_wnids(devkit)
    members = sorted(read_members(archive))  # by name, which is the ground truth's order
    if len(members) != len(wnids):
        raise UserError(f"{archive}: {len(members)} images, but {devkit} has labels for {len(wnids)}; get both again")
    by_class: dict[str, list[Member]] = {}
    for member, wnid in zip(members, wnids, strict=True):
        by_class.setdefault(wnid, []).append(member)
    return [ClassFolder(archive, target / wnid, members=tuple(images)) for wnid, images in sorted(by_class.items())]


def read_validation_wnids(devkit: Path) -> list[str]:
    """The class of each validation image, in the images' order.

    Raises:
        UserError: the devkit lacks a file, or one does not read.
    """
    from scipy.io import loadmat

    files = ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")
    try:
        with tarfile.open(devkit) as tar:
            entries = {Path(entry.name).name: entry for entry in tar.getmembers() if entry.isreg()}
            meta, truth = (tar.extractfile(entries[name]).read() for name in files)  # type: ignore[union-attr]
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        wnid_of = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets}
        return [wnid_of[int(number)] for number in truth.split()]
    except (tarfile.TarError, OSError, KeyError, ValueError, EOFError) as error:
        raise UserError(f"{devkit}: cannot be read ({type(error).__name__}: {error}); get it again") from error


def read_members(archive: Path, within: Member | None = None) -> list[Member]:
    """The files of a tar, or of the tar that lies `within` it; offsets are the archive's own.

    Raises:
        UserError: the tar is cut short, or holds anything but plain files without a folder.
    """
    start = within.offset if within else 0
    where = f"{archive}: {within.name}" if within else str(archive)
    end = start + within.size if within else archive.stat().st_size
    members = []
    try:
        with archive.open("rb") as file:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for entry in tar:
                    if not entry.isreg() or Path(entry.name).name != entry.name or entry.name.startswith("."):
                        raise UserError(f"{where}: refused: {entry.name!r} is not a plain file without a folder")
                    members.append(Member(entry.name, entry.offset_data, entry.size))
    except tarfile.TarError as error:
        raise UserError(f"{where}: not a whole tar ({error}); get it again") from error
    if not members or members[-1].offset + members[-1].size > end:
        raise UserError(f"{where}: cut short, or empty; get it again")
    return members


def _unpack(split: str, folders: Iterable[ClassFolder], pool: ProcessPoolExecutor, report: Report) -> None:
    futures = [pool.submit(make_class_folder, folder) for folder in folders]
    images = 0
    for future in as_completed(futures):
        images += future.result()
        report(f"unpacking {split}", images, IMAGES[split])
    if images != IMAGES[split]:
        raise UserError(f"{split}: {images:,} images in the archive, not {IMAGES[split]:,}; get it again")


def make_class_folder(task: ClassFolder) -> int:
    """Make a class folder, unless it is there already with all its files; returns its number of images.

    Raises:
        UserError: as `read_members`, or the disk refuses; the folder does not exist then.
    """
    members = read_members(task.archive, task.inner) if task.inner else list(task.members)
    if _is_whole(task.folder, members):
        return len(members)
    temporary = task.folder.with_name(f".{task.folder.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(task.folder, ignore_errors=True)
        temporary.mkdir(parents=True)
        with task.archive.open("rb") as archive:
            for member in members:
                _copy(archive, member, temporary / member.name)
        temporary.rename(task.folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"{task.folder}: cannot be written ({error.strerror or error}); the same command goes on from "
                        "here") from error  # fmt: skip
    return len(members)


def _is_whole(folder: Path, members: list[Member]) -> bool:
    try:
        sizes = {entry.name: entry.stat().st_size for entry in os.scandir(folder)}
    except FileNotFoundError:
        return False
    return sizes == {member.name: member.size for member in members}


def _copy(archive: BinaryIO, member: Member, target: Path) -> None:
    archive.seek(member.offset)
    left = member.size
    with target.open("wb") as file:
        while left:
            content = archive.read(min(left, COPY_BYTES))
            if not content:
                raise UserError(f"{archive.name}: cut short in {member.name}; get it again")
            left -= file.write(content)

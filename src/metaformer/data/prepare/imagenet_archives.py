"""ImageNet-1K from the archives of image-net.org to folders or shards, on all cores, with nothing in between.

The archives are plain tars, so an image is a range of bytes that any process can copy: the training archive holds a tar
for each class, the validation archive all images, which the devkit's ground truth sorts into classes. A class folder or
shard appears when it is whole, the data set when all are; the same call again goes on where one was interrupted.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from metaformer.data.prepare.class_folder import write_class_folder
from metaformer.data.prepare.conversion import finish, partial_folder, write_split
from metaformer.data.prepare.pieces import Piece
from metaformer.data.prepare.processes import Report, worker_processes
from metaformer.data.prepare.reencoding import Cost
from metaformer.data.prepare.shard_writer import Packing
from metaformer.errors import UserError
from metaformer.files import write_text_atomically

# Published with the archives, on image-net.org's download page.
MD5 = {
    "train": "1d675b47d978889d74fa0da5fadfb00e",
    "val": "29b22e2961454d5413ddabcf34fc5622",
    "devkit": "fa75699e90414af021442c21a62c3abf",
}
IMAGES = {"train": 1_281_167, "val": 50_000}


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


def unpack_imagenet(
    archives: Archives, out: Path, packing: Packing | None, workers: int, report: Report
) -> dict[str, Cost]:
    """Make `out` with train/ and val/ from the archives, as folders or, with a `packing`, as shards.

    Args:
        workers: processes.
        report: called as the work goes on.

    Returns:
        What reducing cost each split; empty without it.

    Raises:
        UserError: an archive is missing, not the known one, cut short, or holds what does not belong there; or the disk
            is full. What was done so far is kept beside `out`, and `out` does not exist.
    """
    for archive in archives:
        if not archive.is_file():
            raise UserError(f"{archive}: no such file; get it from image-net.org, after signing in")
    partial, costs = partial_folder(out, packing), {}
    partial.mkdir(parents=True, exist_ok=True)
    with worker_processes(workers) as pool:
        _check_hashes(archives, partial / "hashes.json", pool, report)
        for split, folders in (
            ("train", _training_folders(archives.train, partial / "train")),
            ("val", _validation_folders(archives.val, archives.devkit, partial / "val")),
        ):
            if packing is None:
                _unpack(split, folders, pool, report)
                continue
            cost = write_split(_list_pieces(split, folders, pool, report), partial / split, packing, pool, report)
            if cost is not None:
                costs[split] = cost
    (partial / "hashes.json").unlink()
    finish(partial, out)
    return costs


def _check_hashes(archives: Archives, known: Path, pool: ProcessPoolExecutor, report: Report) -> None:
    """MD5 of each archive; one that was right before and is unchanged since is not read again."""
    found = _read_hashes(known)
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
        write_text_atomically(known, json.dumps(found))
        report("checking the archives' hashes", done, len(pending))


def _read_hashes(known: Path) -> dict[str, str]:
    """The archives that were right before; none where the file is damaged, so that they are read again."""
    try:
        found = json.loads(known.read_text())
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


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
    members: list[Member] = []
    names: set[str] = set()
    try:
        with archive.open("rb") as file:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for entry in tar:
                    if not entry.isreg() or Path(entry.name).name != entry.name or entry.name.startswith("."):
                        raise UserError(f"{where}: refused: {entry.name!r} is not a plain file without a folder")
                    if entry.name in names:
                        raise UserError(f"{where}: refused: {entry.name!r} is in it twice; get it again")
                    names.add(entry.name)
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
    _check_count(split, images)


def _list_pieces(split: str, folders: Iterable[ClassFolder], pool: ProcessPoolExecutor, report: Report) -> list[Piece]:
    pieces: list[Piece] = []
    for of_class in pool.map(pieces_of_class, folders):
        pieces += of_class
        report(f"listing {split}", len(pieces), IMAGES[split])
    _check_count(split, len(pieces))
    return pieces


def _check_count(split: str, images: int) -> None:
    if images != IMAGES[split]:
        raise UserError(f"{split}: {images:,} images in the archive, not {IMAGES[split]:,}; get it again")


def make_class_folder(task: ClassFolder) -> int:
    """Make a class folder, unless it is there already with all its files; returns its number of images.

    Raises:
        UserError: as `read_members`, or the disk refuses; the folder does not exist then.
    """
    return write_class_folder(task.folder, pieces_of_class(task))


def pieces_of_class(task: ClassFolder) -> list[Piece]:
    """The images of a class, in its archive's order.

    Raises:
        UserError: as `read_members`.
    """
    members = read_members(task.archive, task.inner) if task.inner else task.members
    return [Piece(f"{task.folder.name}/{name}", str(task.archive), offset, size) for name, offset, size in members]

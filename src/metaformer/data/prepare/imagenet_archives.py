"""Conversion of ImageNet-1K's archives to folders, shards or pixels, in parallel and without intermediate files.

The archives are plain tars, so an image is a byte range that any process can copy. The training archive contains one
tar per class; the validation archive contains all images, which the devkit's ground truth assigns to classes. Class
folders, shards and the data set are written atomically, and an interrupted call is resumed by repeating it.
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
from metaformer.data.prepare.conversion import AnyPacking, finish, partial_folder, write_splits
from metaformer.data.prepare.processes import ProgressCallback, worker_processes
from metaformer.data.prepare.reencoding import ReencodingEffect
from metaformer.data.prepare.source_images import SourceImage
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
    """ImageNet's three archives."""

    train: Path
    val: Path
    devkit: Path


class Member(NamedTuple):
    """A file in a tar, as a byte range of the archive."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class ClassFolder:
    """A class folder to write, either from `members` of an archive or from all members of its `inner` tar."""

    archive: Path
    folder: Path
    members: tuple[Member, ...] = ()
    inner: Member | None = None


def unpack_imagenet(
    archives: Archives, out: Path, packing: AnyPacking | None, workers: int, report: ProgressCallback
) -> dict[str, ReencodingEffect]:
    """Write train/ and val/ from the archives to `out`: as shards or pixels if `packing` is given, else as folders.

    If this fails, `out` does not exist, and the work done so far is kept next to it.

    Args:
        workers: number of processes.
        report: called with the progress.

    Returns:
        The effect on the images of each split, as `write_splits`.
    """
    for archive in archives:
        if not archive.is_file():
            raise UserError(f"{archive}: no such file; download it from image-net.org after signing in")
    partial = partial_folder(out, packing)
    effects: dict[str, ReencodingEffect] = {}
    sources: dict[str, list[SourceImage]] = {}
    partial.mkdir(parents=True, exist_ok=True)
    with worker_processes(workers) as pool:
        _check_hashes(archives, partial / "hashes.json", pool, report)
        for split, folders in (
            ("train", _training_folders(archives.train, partial / "train")),
            ("val", _validation_folders(archives.val, archives.devkit, partial / "val")),
        ):
            if packing is None:
                _unpack(split, folders, pool, report)
            else:
                sources[split] = _list_source_images(split, folders, pool, report)
        if packing is not None:
            effects = write_splits(sources, partial, packing, pool, report)
    (partial / "hashes.json").unlink()
    finish(partial, out)
    return effects


def _check_hashes(archives: Archives, cache: Path, pool: ProcessPoolExecutor, report: ProgressCallback) -> None:
    """Check the MD5 of each archive; archives that were verified before and have not changed are not read again."""
    verified = _read_hashes(cache)
    states = {}
    for name, archive in archives._asdict().items():
        stat = archive.stat()
        states[name] = f"{archive.absolute()} {stat.st_size} {stat.st_mtime_ns}"
    pending = {pool.submit(_md5, getattr(archives, name)): name for name in MD5 if states[name] not in verified}
    for done, future in enumerate(as_completed(pending), 1):
        name = pending[future]
        if future.result() != MD5[name]:
            raise UserError(
                f"{getattr(archives, name)}: not the published archive (its MD5 is not {MD5[name]}); download it again"
            )
        verified[states[name]] = MD5[name]
        write_text_atomically(cache, json.dumps(verified))
        report("checking the archives' hashes", done, len(pending))


def _read_hashes(cache: Path) -> dict[str, str]:
    """Return the archives verified before; empty if the file is damaged, so that the archives are read again."""
    try:
        verified = json.loads(cache.read_text())
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return verified if isinstance(verified, dict) else {}


def _md5(archive: Path) -> str:
    with archive.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _training_folders(archive: Path, target: Path) -> list[ClassFolder]:
    inner = read_members(archive)
    return [ClassFolder(archive, target / Path(member.name).stem, inner=member) for member in inner]


def _validation_folders(archive: Path, devkit: Path, target: Path) -> list[ClassFolder]:
    wnids = read_validation_wnids(devkit)
    members = sorted(read_members(archive))  # by name, which is the order of the ground truth
    if len(members) != len(wnids):
        raise UserError(
            f"{archive}: {len(members)} images, but {devkit} has labels for {len(wnids)}; download both again"
        )
    by_class: dict[str, list[Member]] = {}
    for member, wnid in zip(members, wnids, strict=True):
        by_class.setdefault(wnid, []).append(member)
    return [ClassFolder(archive, target / wnid, members=tuple(images)) for wnid, images in sorted(by_class.items())]


def read_validation_wnids(devkit: Path) -> list[str]:
    """Return the wnid of each validation image, in the order of the images."""
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
        raise UserError(f"{devkit}: cannot be read ({type(error).__name__}: {error}); download it again") from error


def read_members(archive: Path, within: Member | None = None) -> list[Member]:
    """List the files of a tar, or of the inner tar `within` it; offsets are relative to the outer archive."""
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
                        raise UserError(f"{where}: refused: {entry.name!r} is not a regular file at the top level")
                    if entry.name in names:
                        raise UserError(f"{where}: refused: {entry.name!r} occurs twice; download it again")
                    names.add(entry.name)
                    members.append(Member(entry.name, entry.offset_data, entry.size))
    except tarfile.TarError as error:
        raise UserError(f"{where}: not a complete tar ({error}); download it again") from error
    if not members or members[-1].offset + members[-1].size > end:
        raise UserError(f"{where}: truncated or empty; download it again")
    return members


def _unpack(split: str, folders: Iterable[ClassFolder], pool: ProcessPoolExecutor, report: ProgressCallback) -> None:
    futures = [pool.submit(make_class_folder, folder) for folder in folders]
    images = 0
    for future in as_completed(futures):
        images += future.result()
        report(f"unpacking {split}", images, IMAGES[split])
    _check_count(split, images)


def _list_source_images(
    split: str, folders: Iterable[ClassFolder], pool: ProcessPoolExecutor, report: ProgressCallback
) -> list[SourceImage]:
    sources: list[SourceImage] = []
    for class_sources in pool.map(source_images_of_class, folders):
        sources += class_sources
        report(f"listing {split}", len(sources), IMAGES[split])
    _check_count(split, len(sources))
    return sources


def _check_count(split: str, images: int) -> None:
    if images != IMAGES[split]:
        raise UserError(f"{split}: {images:,} images in the archive, not {IMAGES[split]:,}; download it again")


def make_class_folder(task: ClassFolder) -> int:
    """Write a class folder, unless it already exists with all its files; return its number of images.

    If this fails, the folder does not exist.
    """
    return write_class_folder(task.folder, source_images_of_class(task))


def source_images_of_class(task: ClassFolder) -> list[SourceImage]:
    """List the images of a class in the order of the archive."""
    members = read_members(task.archive, task.inner) if task.inner else task.members
    return [
        SourceImage(f"{task.folder.name}/{name}", str(task.archive), offset, size) for name, offset, size in members
    ]

"""The index of a data set: which images there are, in an order that never changes.

Layout on disk, as ImageNet's: SPLIT/CLASS/IMAGE, classes and images in sorted order, labels as torchvision's
ImageFolder gives them (`label_schemes` gives others); or the same images packed into SPLIT/shard-*.tar (`shards`), with
the same index. A scan is kept in a cache beside the data (or in the user's cache folder where the data is read-only)
and reused while no folder, or shard, has changed.
"""

import hashlib
import os
import unicodedata
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from metaformer.data.index_cache import load_scan, store_scan
from metaformer.data.scan import EXTENSIONS, Images, Scan, describe_passed_over, is_current, is_hidden, scan
from metaformer.data.shards import Shards, ShardScan, check_members, holds_shards, list_shards, scan_shards
from metaformer.errors import UserError, printable


class Source(Enum):
    """Where a data set comes from when its folder does not exist yet."""

    folder = "folder"  # the user brings it
    sample = "sample"  # built on first use from a package's data


class IndexCheck(Enum):
    """What is compared with the index of an earlier start; a difference makes a new scan."""

    quick = "quick"  # the times of all folders, the sizes and times of a thousand files, or of all shards
    files = "files"  # the sizes and times of all files; in shards, the names and sizes of all images


class Labels(Enum):
    """What an image's label is; `label_schemes` has those of ImageNet's test sets."""

    folders = "folders"  # the place of its class folder among the class folders
    numbers = "numbers"  # the number that its class folder is named by, 0 to 999
    wnids = "wnids"  # the place of its class folder's name among the 1000 wnids of ImageNet-1K
    real = "real"  # several labels, all right, known by the file's name: ReaL (arXiv 2006.07159)


class ClassSubset(Enum):
    """Some of ImageNet-1K's classes."""

    imagenet_a = "imagenet_a"  # arXiv 1907.07174
    imagenet_r = "imagenet_r"  # arXiv 2006.16241


@dataclass
class DataConfig:
    """A data set on disk."""

    name: str = "imagenet"
    root: str = "data/imagenet"  # holds the split folders
    train_split: str | None = "train"  # None: a test set
    val_split: str = "val"  # ".": the class folders lie in `root` itself
    source: Source = Source.folder
    check: IndexCheck = IndexCheck.quick
    quarantine: str | None = None  # a list of files to leave out, as scripts/scan_data.py writes it
    labels: Labels = Labels.folders
    class_subset: ClassSubset | None = None  # the network chooses among these classes only
    expected_images: int | None = None  # published counts of a test set: a part of it gives another accuracy
    expected_classes: int | None = None

    def __post_init__(self) -> None:
        self.root = os.path.expanduser(self.root)  # noqa: PTH111
        if self.quarantine is not None:
            self.quarantine = os.path.expanduser(self.quarantine)  # noqa: PTH111
        if self.class_subset is not None and self.labels is not Labels.wnids:
            raise UserError(f"data.class_subset={self.class_subset.value}: needs class folders named by wnids; "
                            "give data.labels=wnids")  # fmt: skip

    def check_can_train(self) -> None:
        """Refuse what only serves to evaluate.

        Raises:
            UserError: a test set, or labels that are not the folders' places.
        """
        if self.train_split is None:
            raise UserError(f"data={self.name}: a test set, without a training split; use it with validate.py")
        if self.labels is not Labels.folders:
            raise UserError(f"data.labels={self.labels.value}: for validate.py only; train with data.labels=folders")


@dataclass(frozen=True)
class ImageIndex:
    """The images of one split.

    Attributes:
        folder: the split's folder.
        classes: names; a label is a position in them.
        paths: uint8 [N, L], each row a file's path below `folder`, or its name in its shard, padded with NUL.
        labels: int64 [N]; with `label_sets`, rows of it.
        sizes: int64 [N], bytes.
        fingerprint: sha256 over classes, paths and sizes, and over labels where they are not the folders' places.
        label_sets: int64 [S, L], where an image may have several labels; short rows end in -1.
        quarantined: images that were left out of the split by a list.
        shards: where images lie that are no files.
        notes: what to tell the user about the data set, in lines.
    """

    folder: Path
    classes: tuple[str, ...]
    paths: NDArray[np.uint8]
    labels: NDArray[np.int64]
    sizes: NDArray[np.int64]
    fingerprint: str
    label_sets: NDArray[np.int64] | None = None
    quarantined: int = 0
    shards: Shards | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_labelled_classes(self) -> int:
        """Classes that are the label of an image here."""
        labels = self.labels if self.label_sets is None else self.label_sets[self.labels]
        return len(np.unique(labels[labels >= 0]))

    def name(self, sample: int) -> str:
        """One sample's path below the split's folder, CLASS/IMAGE, also where it lies in a shard."""
        return os.fsdecode(self.paths[sample].tobytes().rstrip(b"\0"))

    def path(self, sample: int) -> Path:
        """The file of one sample; there is none where images lie in shards."""
        assert self.shards is None
        return self.folder / self.name(sample)

    def byte_range(self, sample: int) -> tuple[Path, int, int]:
        """Where the bytes of one sample are: a file or a shard, the offset in it, and how many."""
        if self.shards is None:
            return self.path(sample), 0, int(self.sizes[sample])
        shard = self.folder / self.shards.names[self.shards.numbers[sample]]
        return shard, int(self.shards.offsets[sample]), int(self.sizes[sample])

    def place(self, sample: int) -> str:
        """Where one sample lies, for people: a file, or SHARD: MEMBER."""
        if self.shards is None:
            return str(self.path(sample))
        return f"{self.folder / self.shards.names[self.shards.numbers[sample]]}: {self.name(sample)}"

    def select(self, samples: NDArray[np.int64]) -> "ImageIndex":
        """The index of these images alone, in this order."""
        digest = hashlib.sha256(self.fingerprint.encode() + samples.tobytes()).hexdigest()
        arrays = {name: getattr(self, name)[samples] for name in ("paths", "labels", "sizes")}
        shards = self.shards and Shards(self.shards.names, self.shards.numbers[samples], self.shards.offsets[samples])
        return replace(self, **arrays, fingerprint=digest, shards=shards)


def load_index(root: Path, split: str, check: IndexCheck = IndexCheck.quick) -> ImageIndex:
    """The index of `root/split`, from the kept scan as far as `check` finds it true, else from a new one.

    Raises:
        UserError: the folder is missing, flat, or has a class without images; a shard is not as it should be; or a
            folder or file cannot be read.
    """
    folder = root / split
    try:
        if holds_shards(folder):
            return _index(folder, *_known_shards(root, split, check))
        return _index(folder, *_known_files(root, split, check))
    except OSError as error:
        raise UserError(
            f"data.root: {error.filename} cannot be read ({error.strerror}); give yourself the right to, or remove it"
        ) from error


def _known_files(root: Path, split: str, check: IndexCheck) -> tuple[Scan, list[str]]:
    folder, classes = root / split, _class_folders(root, split)

    def is_true(kept: Scan) -> bool:
        return is_current(kept, folder, check is IndexCheck.files)

    notes: list[str] = []
    found = load_scan(Scan, root, split, {"classes": classes}, is_true, notes.append)
    return store_scan(scan(folder, classes), root, split) if found is None else found, notes


def _known_shards(root: Path, split: str, check: IndexCheck) -> tuple[ShardScan, list[str]]:
    folder = root / split
    tars = list_shards(folder)
    notes: list[str] = []
    found = load_scan(ShardScan, root, split, {"tars": tars}, lambda kept: True, notes.append)
    if found is None:
        found = store_scan(scan_shards(folder, tars), root, split)
    if check is IndexCheck.files:
        check_members(found, folder)
    return found, notes


def find_images(folder: Path) -> ImageIndex:
    """All images below a folder, in class folders, without or in shards; nothing is cached.

    Raises:
        UserError: there are none, or images lie beside class folders.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if holds_shards(folder):
        return _index(folder, scan_shards(folder, list_shards(folder)))
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not is_hidden(entry.name))
    if classes and any(entry.name.lower().endswith(EXTENSIONS) for entry in folder.iterdir() if entry.is_file()):
        raise UserError(f"{folder}: images lie beside class folders; give a folder of one kind")
    return _index(folder, scan(folder, classes or ["."]))


def _index(folder: Path, found: Images, notes: list[str] | None = None) -> ImageIndex:
    notes = [] if notes is None else notes
    if isinstance(found, Scan) and found.passed_over:
        counts = describe_passed_over(found.passed_over)
        notes.append(
            f"{folder}: passed over {sum(found.passed_over.values()):,} files that are not named as images: {counts}"
        )
    shards = Shards(tuple(found.tars), found.numbers, found.offsets) if isinstance(found, ShardScan) else None
    return ImageIndex(
        folder,
        found.classes,
        found.paths,
        found.labels,
        found.sizes,
        found.fingerprint,
        shards=shards,
        notes=tuple(map(printable, notes)),
    )


def check_several_classes(index: ImageIndex, config: DataConfig, split: str) -> None:
    """Refuse class folders that make one class, of which every guess is right.

    Raises:
        UserError: names the folder that was probably meant.
    """
    if len(index.classes) > 1 or config.labels is not Labels.folders:
        return
    (name,) = index.classes
    below = {PurePosixPath(index.name(sample)).parent for sample in range(len(index))}
    if all(len(folder.parts) > 1 for folder in below) and len(below) > 1:
        field = "val_split" if split == config.val_split else "train_split"
        mend = f"the classes seem to be the folders in it: give data.{field}={PurePosixPath(split, name)}"
    else:
        mend = "give the folder that holds the class folders"
    raise UserError(f"data.root={config.root}: all images of {split} are in one class folder, {name}; {mend}")


def check_same_classes(train: ImageIndex, val: ImageIndex) -> None:
    """Labels of the two splits must mean the same.

    Raises:
        UserError: names the classes that only one split has.
    """
    for here, there in ((train, val), (val, train)):
        extra = sorted(set(here.classes) - set(there.classes))
        if extra:
            same = {unicodedata.normalize("NFC", name): name for name in there.classes}
            for name in extra:
                other = same.get(unicodedata.normalize("NFC", name))
                if other is not None:
                    raise UserError(
                        f"data.root: class folder {name} looks alike in both splits but is {name!a} in "
                        f"{here.folder} and {other!a} in {there.folder} (Unicode normalisation); rename one"
                    )
            names = ", ".join(extra[:5]) + (f" and {len(extra) - 5} more" if len(extra) > 5 else "")
            raise UserError(f"data.root: class folders {names} are in {here.folder} but not in {there.folder}")


def _class_folders(root: Path, split: str) -> list[str]:
    folder = root / split
    if not folder.is_dir():
        raise UserError(f"data.root={root}: no folder {folder.absolute()}; {_expected_layout(split)}")
    with os.scandir(folder) as entries:
        listing = [(e.name, e.is_dir()) for e in entries if not is_hidden(e.name)]
    classes = sorted(name for name, is_dir in listing if is_dir)
    if not classes:
        what = "images lie in it without class folders" if listing else "it is empty"
        raise UserError(f"data.root={root}: {folder.absolute()} is not a data set: {what}; {_expected_layout(split)}")
    return classes


def _expected_layout(split: str) -> str:
    if split == ".":
        return "data.root must hold the class folders: CLASS/*.JPEG below it; see docs/data.md"
    return (
        f"expected {split}/CLASS/*.JPEG below data.root; "
        "prepare ImageNet with `python scripts/prepare_data.py imagenet --help`, or try data=sample"
    )

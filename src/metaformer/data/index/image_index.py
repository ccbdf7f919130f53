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
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from metaformer.data.index.cache import ImageSource, load_or_scan
from metaformer.data.index.config import DataConfig, IndexCheck, Labels
from metaformer.data.index.files import (
    EXTENSIONS,
    FileScan,
    FileSource,
    Images,
    describe_passed_over,
    is_hidden,
    scan_files,
)
from metaformer.data.index.shards import Shards, ShardScan, ShardSource, holds_shards
from metaformer.errors import UserError, printable


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
    """Return the index of `root/split`: from the cached scan if `check` finds it current, else from a new scan.

    Raises:
        UserError: the folder is missing, flat, or has a class without images; a shard is not as it should be; or a
            folder or file cannot be read.
    """
    folder, notes = root / split, list[str]()
    try:
        source: ImageSource = ShardSource(folder) if holds_shards(folder) else FileSource(root, split)
        found = load_or_scan(source, root, split, check is IndexCheck.files, notes.append)
    except OSError as error:
        raise UserError(
            f"data.root: {error.filename} cannot be read ({error.strerror}); make it readable, or remove it"
        ) from error
    return _index(folder, found, notes)


def find_images(folder: Path) -> ImageIndex:
    """All images below a folder, in class folders, without or in shards; nothing is cached.

    Raises:
        UserError: there are none, or images lie beside class folders.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if holds_shards(folder):
        return _index(folder, ShardSource(folder).scan())
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not is_hidden(entry.name))
    if classes and any(entry.name.lower().endswith(EXTENSIONS) for entry in folder.iterdir() if entry.is_file()):
        raise UserError(f"{folder}: images lie beside class folders; give a folder of one kind")
    return _index(folder, scan_files(folder, classes or ["."]))


def _index(folder: Path, found: Images, notes: list[str] | None = None) -> ImageIndex:
    notes = [] if notes is None else notes
    if isinstance(found, FileScan) and found.passed_over:
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

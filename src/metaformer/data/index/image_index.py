"""Index of the images of a split, in a fixed order.

The layout on disk is ImageNet's, SPLIT/CLASS/IMAGE, with classes and images in sorted order and the labels of
torchvision's ImageFolder (`labels` provides others). The same images packed into SPLIT/shard-*.tar (`shards`), or
decoded into SPLIT/pixels-*.safetensors (`pixels`), have the same index. A scan is cached next to the data, or in the
user's cache folder if the data is read-only, and reused until a folder or shard changes.
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
    SplitScan,
    describe_passed_over,
    is_hidden,
    scan_files,
)
from metaformer.data.index.pixels import PixelScan, PixelSource, holds_pixels
from metaformer.data.index.shards import NO_CHECKSUM, Pixels, Shards, ShardScan, ShardSource, holds_shards
from metaformer.errors import UserError, printable


@dataclass(frozen=True)
class ImageIndex:
    """The images of one split.

    Attributes:
        folder: the split's folder.
        classes: class names; a label is a position in this tuple.
        paths: uint8 [N, L], each row the path of a file below `folder`, or its name in its shard, padded with NUL.
        labels: int64 [N]; row numbers of `label_sets` if that is given.
        sizes: int64 [N], in bytes; those of the pixels if the images are stored decoded.
        fingerprint: SHA-256 over classes, paths and sizes, and over labels that are not positions of class folders.
        label_sets: int64 [S, L] if an image may have several labels; short rows are padded with -1.
        quarantined: number of images excluded from the split by a quarantine list.
        shards: location of the images if they are packed into shards, encoded or as pixels.
        notes: messages about the data set for the user, one line each.
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
        """Number of classes that at least one image has as a label."""
        labels = self.labels if self.label_sets is None else self.label_sets[self.labels]
        return len(np.unique(labels[labels >= 0]))

    def name(self, sample: int) -> str:
        """Return a sample's path below the split's folder, CLASS/IMAGE, whether it is a file or in a shard."""
        return os.fsdecode(self.paths[sample].tobytes().rstrip(b"\0"))

    def path(self, sample: int) -> Path:
        """Return a sample's file. Not defined for shards."""
        assert self.shards is None
        return self.folder / self.name(sample)

    def byte_range(self, sample: int) -> tuple[Path, int, int]:
        """Return the file or shard that contains a sample, the sample's offset in it, and its size in bytes."""
        if self.shards is None:
            return self.path(sample), 0, int(self.sizes[sample])
        shard = self.folder / self.shards.names[self.shards.numbers[sample]]
        return shard, int(self.shards.offsets[sample]), int(self.sizes[sample])

    def location(self, sample: int) -> str:
        """Describe where a sample is stored, for messages: its file, or SHARD: MEMBER."""
        if self.shards is None:
            return str(self.path(sample))
        return f"{self.folder / self.shards.names[self.shards.numbers[sample]]}: {self.name(sample)}"

    def select(self, samples: NDArray[np.int64]) -> "ImageIndex":
        """Return the index of the given samples only, in the given order."""
        digest = hashlib.sha256(self.fingerprint.encode() + samples.tobytes()).hexdigest()
        arrays = {name: getattr(self, name)[samples] for name in ("paths", "labels", "sizes")}
        shards = self.shards and self.shards.with_arrays(*(array[samples] for array in self.shards.arrays))
        return replace(self, **arrays, fingerprint=digest, shards=shards)


def load_index(root: Path, split: str, check: IndexCheck = IndexCheck.quick) -> ImageIndex:
    """Return the index of `root/split`, from the cached scan if `check` finds it current, otherwise from a new scan.

    Raises:
        UserError: the folder is missing, has no class folders or has a class without images; a shard is damaged; or a
            folder or file cannot be read.
    """
    folder, notes = root / split, list[str]()
    try:
        source = _packed_source(folder) or FileSource(root, split)
        scan = load_or_scan(source, root, split, check is IndexCheck.files, notes.append)
    except OSError as error:
        raise UserError(
            f"data.root: {error.filename} cannot be read ({error.strerror}); make it readable or remove it"
        ) from error
    if check is IndexCheck.files and isinstance(scan, ShardScan) and (scan.checksums == NO_CHECKSUM).any():
        notes.append(
            f"{folder}: its shards have no checksums, so data.check=files compared only names and sizes; pack it again"
        )
    return _index(folder, scan, notes)


def find_images(folder: Path) -> ImageIndex:
    """Index all images of a folder without caching: in class folders, packed, or directly in the folder."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    source = _packed_source(folder)
    if source is not None:
        return _index(folder, source.scan(check_all=False))
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not is_hidden(entry.name))
    if classes and any(entry.name.lower().endswith(EXTENSIONS) for entry in folder.iterdir() if entry.is_file()):
        raise UserError(f"{folder}: contains both images and class folders; give a folder that contains only one kind")
    return _index(folder, scan_files(folder, classes or ["."]))


def _packed_source(folder: Path) -> ImageSource | None:
    """Return the source of a folder with shards or pixels; None for any other folder."""
    if holds_pixels(folder):
        return PixelSource(folder)
    return ShardSource(folder) if holds_shards(folder) else None


def _index(folder: Path, scan: SplitScan, notes: list[str] | None = None) -> ImageIndex:
    notes = [] if notes is None else notes
    if isinstance(scan, FileScan) and scan.passed_over:
        counts = describe_passed_over(scan.passed_over)
        notes.append(f"{folder}: skipped {sum(scan.passed_over.values()):,} files without an image suffix: {counts}")
    return ImageIndex(
        folder,
        scan.classes,
        scan.paths,
        scan.labels,
        scan.sizes,
        scan.fingerprint,
        shards=_location(scan),
        notes=tuple(map(printable, notes)),
    )


def _location(scan: SplitScan) -> Shards | None:
    if isinstance(scan, PixelScan):
        states = tuple((size, changed) for _, size, _, _, changed in scan.files.values())
        return Shards(tuple(scan.files), scan.numbers, scan.offsets, scan.checksums, Pixels(scan.shapes, states))
    if isinstance(scan, ShardScan):
        return Shards(tuple(scan.tars), scan.numbers, scan.offsets, scan.checksums)
    return None


def check_several_classes(index: ImageIndex, config: DataConfig, split: str) -> None:
    """Raise an error if there is only one class folder, in which case every prediction would be correct.

    The message names the folder that was probably meant.
    """
    if len(index.classes) > 1 or config.labels is not Labels.folders:
        return
    (name,) = index.classes
    below = {PurePosixPath(index.name(sample)).parent for sample in range(len(index))}
    if all(len(folder.parts) > 1 for folder in below) and len(below) > 1:
        field = "val_split" if split == config.val_split else "train_split"
        advice = f"the classes seem to be the folders in it: set data.{field}={PurePosixPath(split, name)}"
    else:
        advice = "give the folder that contains the class folders"
    raise UserError(f"data.root={config.root}: all images of {split} are in one class folder, {name}; {advice}")


def check_same_classes(train: ImageIndex, val: ImageIndex) -> None:
    """Raise an error that names the missing classes if the splits do not have the same classes."""
    for index, other in ((train, val), (val, train)):
        extra = sorted(set(index.classes) - set(other.classes))
        if extra:
            by_normalized_name = {unicodedata.normalize("NFC", name): name for name in other.classes}
            for name in extra:
                lookalike = by_normalized_name.get(unicodedata.normalize("NFC", name))
                if lookalike is not None:
                    raise UserError(
                        f"data.root: class folder {name} looks the same in both splits but is {name!a} in "
                        f"{index.folder} and {lookalike!a} in {other.folder} (Unicode normalisation); rename one"
                    )
            names = ", ".join(extra[:5]) + (f" and {len(extra) - 5} more" if len(extra) > 5 else "")
            raise UserError(f"data.root: class folders {names} are in {index.folder} but not in {other.folder}")

"""Configuration of a data set."""

import os
from dataclasses import dataclass
from enum import Enum

from metaformer.errors import UserError


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

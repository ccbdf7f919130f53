"""Configuration of a data set."""

import os
from dataclasses import dataclass
from enum import Enum

from metaformer.errors import UserError


class Source(Enum):
    """Origin of a data set whose folder does not exist yet."""

    folder = "folder"  # provided by the user
    sample = "sample"  # built on first use from the data of a Python package


class IndexCheck(Enum):
    """Extent of the comparison with the cached index; any difference triggers a new scan."""

    quick = "quick"  # modification times of all folders; sizes and times of a thousand files, or of all shards
    files = "files"  # sizes and times of all files; checksums of images in shards, and of pixels


class Labels(Enum):
    """Source of an image's label; see `labels` for ImageNet's test sets."""

    folders = "folders"  # position of its class folder among the class folders
    numbers = "numbers"  # number that names its class folder, 0 to 999
    wnids = "wnids"  # position of its class folder's name among the 1000 wnids of ImageNet-1K
    real = "real"  # one or more correct labels, looked up by file name: ReaL (arXiv 2006.07159)


class MatchClasses(Enum):
    """Rule by which validate.py maps class folders to the classes that the weights record."""

    name = "name"  # by their names; some classes may be missing
    order = "order"  # by their order, whatever their names are


class ClassSubset(Enum):
    """Subsets of ImageNet-1K's classes."""

    imagenet_a = "imagenet_a"  # arXiv 1907.07174
    imagenet_r = "imagenet_r"  # arXiv 2006.16241


class Balance(Enum):
    """Uses of a class in an epoch of training, in proportion to n^p for a class of n images."""

    none = "none"  # p = 1: every image once
    sqrt = "sqrt"  # p = 1/2
    uniform = "uniform"  # p = 0: every class equally often


@dataclass
class DataConfig:
    """A data set on disk."""

    name: str = "imagenet"  # name of the data set in results and reports
    root: str = "data/imagenet"  # contains the split folders
    train_split: str | None = "train"  # None for a test set
    val_split: str = "val"  # "." if `root` itself contains the class folders
    source: Source = Source.folder  # what to do if the folder does not exist
    check: IndexCheck = IndexCheck.quick  # what to compare with the cached index at each start
    quarantine: str | None = None  # list of files to exclude, as written by scripts/scan_data.py
    labels: Labels = Labels.folders  # how an image gets its label
    balance: Balance = Balance.none  # balance of the classes in training
    class_subset: ClassSubset | None = None  # evaluate predictions among these classes only
    expected_images: int | None = None  # published counts of a test set; an incomplete set gives another accuracy
    expected_classes: int | None = None  # published number of classes of a test set

    def __post_init__(self) -> None:
        if not self.root:  # would be the current folder
            raise UserError("data.root: empty; give a folder, or unset an empty variable such as IMAGENET_DIR")
        self.root = os.path.expanduser(self.root)  # noqa: PTH111
        if self.quarantine is not None:
            self.quarantine = os.path.expanduser(self.quarantine)  # noqa: PTH111
        if self.class_subset is not None and self.labels is not Labels.wnids:
            raise UserError(f"data.class_subset={self.class_subset.value}: requires class folders named by wnid; "
                            "set data.labels=wnids")  # fmt: skip

    def check_can_train(self) -> None:
        """Raise a UserError for a test set, or for labels that only evaluation supports."""
        if self.train_split is None:
            raise UserError(f"data={self.name}: this test set has no training split; evaluate on it with validate.py")
        if self.labels is not Labels.folders:
            raise UserError(f"data.labels={self.labels.value}: validate.py only; train with data.labels=folders")

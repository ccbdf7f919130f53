"""Opens the training and validation splits of a run."""

from typing import NamedTuple

from metaformer.assembly.parts import open_index
from metaformer.config import TrainConfig
from metaformer.data.index.image_index import ImageIndex, check_same_classes
from metaformer.errors import UserError
from metaformer.runtime import Runtime


class Splits(NamedTuple):
    """Indices of the training and validation split, and the number of classes."""

    train: ImageIndex
    val: ImageIndex
    num_classes: int


def open_splits(config: TrainConfig, runtime: Runtime) -> Splits:
    """Open both splits, check them against each other, and count the classes unless `num_classes` is given."""
    assert config.data.train_split is not None
    train, val = (open_index(config, runtime, split) for split in (config.data.train_split, config.data.val_split))
    check_same_classes(train, val)
    found = len(train.classes)
    num_classes = config.num_classes or found
    if num_classes < found or (num_classes > found and not config.allow_unused_classes):
        unused = "" if num_classes < found else ", or give allow_unused_classes=true to keep outputs without images"
        raise UserError(
            f"num_classes={num_classes}: {config.data.root} has {found} classes; leave it null to count them{unused}"
        )
    return Splits(train, val, num_classes)

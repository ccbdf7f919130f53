"""Writes the results of each class to files; docs/runs.md describes them."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from metaformer.evaluation.class_counts import ClassTotals
from metaformer.files import remove_temporaries, write_atomically

PER_CLASS_HEADER = ("class", "images", "top1", "top5")


def write_per_class(path: Path, classes: Sequence[str], totals: ClassTotals) -> None:
    """Write a CSV file with a row for each class that has images: its name, their number, top-1 and top-5 in percent.

    Args:
        classes: names of the first outputs of the network, which include all classes that have images.

    Raises:
        OSError: the file cannot be written; an earlier one is unchanged.
    """

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(PER_CLASS_HEADER)
            for label in np.flatnonzero(totals.images).tolist():
                images = int(totals.images[label])
                percents = (f"{100 * int(hits[label]) / images:.3f}" for hits in (totals.top1, totals.top5))
                writer.writerow((classes[label], images, *percents))

    write_atomically(path, write)
    remove_temporaries(path)


def write_confusion(path: Path, classes: Sequence[str], totals: ClassTotals, step: int) -> None:
    """Write the confusion matrix, if there is one, as an npz file with `counts`, `classes` and `step`.

    Raises:
        OSError: the file cannot be written; an earlier one is unchanged.
    """
    if totals.confusion is None:
        return
    counts = totals.confusion

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez_compressed(file, counts=counts, classes=np.array(classes, np.str_), step=np.int64(step))

    path.parent.mkdir(exist_ok=True)
    write_atomically(path, write)
    remove_temporaries(path)

"""Reads the results by class of a run's last validation from its files, which docs/runs.md describes."""

import csv
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from metaformer.wnids import describe_wnids

MAX_PAIRS = 20
READ_ERRORS = (OSError, ValueError, KeyError, TypeError, EOFError, csv.Error, zipfile.BadZipFile)


class ClassAccuracy(NamedTuple):
    """Accuracy of a class in percent."""

    name: str
    images: int
    top1: float
    top5: float


class ConfusedPair(NamedTuple):
    """A class whose images were predicted as another class."""

    name: str
    predicted: str
    images: int
    share: float  # percent of the class's images


class Confusion(NamedTuple):
    """The most confused pairs, most images first, and the step of their validation."""

    step: int
    pairs: list[ConfusedPair]


def read_per_class(file: Path) -> list[ClassAccuracy]:
    """Return the classes of per_class.csv, those with the lowest top-1 first.

    Raises:
        OSError, ValueError, ...: one of READ_ERRORS: the file is damaged.
    """
    with file.open(newline="") as text:
        reader = csv.DictReader(text)
        if not {"class", "images", "top1", "top5"} <= set(reader.fieldnames or ()):
            raise ValueError("not a table of accuracies by class")
        rows = [
            ClassAccuracy(row["class"], int(row["images"]), _percent(row["top1"]), _percent(row["top5"]))
            for row in reader
        ]
    names = readable([row.name for row in rows])
    named = [row._replace(name=name) for row, name in zip(rows, names, strict=True)]
    return sorted(named, key=lambda row: (row.top1, row.top5, row.name))


def read_confusion(file: Path) -> Confusion:
    """Return the most confused pairs of confusion.npz.

    Raises:
        OSError, ValueError, ...: one of READ_ERRORS: the file is damaged.
    """
    with file.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
        counts, classes, step = arrays["counts"], arrays["classes"], int(arrays["step"])
    outputs = len(counts)
    if counts.shape != (outputs, outputs) or counts.dtype.kind != "i" or classes.ndim != 1 or len(classes) > outputs:
        raise ValueError("not a confusion matrix with the names of its classes")
    images = counts.sum(1)
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:MAX_PAIRS]
    names = readable([*classes.tolist(), *map(str, range(len(classes), outputs))])
    pairs = [
        ConfusedPair(names[row], names[column], int(wrong[row, column]), 100 * wrong[row, column] / images[row])
        for row, column in zip(*np.unravel_index(order, counts.shape), strict=True)
        if wrong[row, column] > 0
    ]
    return Confusion(step, pairs)


def _percent(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 100:
        raise ValueError(f"{text}: not a number of percent")
    return value


def readable(names: list[str]) -> list[str]:
    """Return the first word for each class where the names are wnids, followed by the wnid, else the names."""
    descriptions = describe_wnids(names)
    if descriptions is None:
        return names
    return [f"{description.partition(',')[0]} ({name})" for description, name in zip(descriptions, names, strict=True)]

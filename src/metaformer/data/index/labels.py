"""ImageNet-1K labels for its test sets, whose class folders are not the 1000 sorted class folders of ImageNet-1K.

The wnids, the classes of ImageNet-A and ImageNet-R, and ReaL's labels are read from files in the timm package.
"""

import hashlib
import json
import pkgutil
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from timm.data import ImageNetInfo

from metaformer.data.index.config import ClassSubset, DataConfig, Labels
from metaformer.data.index.image_index import ImageIndex
from metaformer.errors import UserError

_VALIDATION_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})")


def relabel(index: ImageIndex, config: DataConfig) -> ImageIndex:
    """Return the index with the labels that the configuration requests.

    Unless these are the labels of the folders, `classes` become ImageNet-1K's wnids. Images without a ReaL label are
    excluded.
    """
    if config.labels is Labels.folders:
        return index
    if config.labels is Labels.real:
        return _with_real_labels(index)
    wnids = _wnids()
    names = [str(label) for label in range(len(wnids))] if config.labels is Labels.numbers else wnids
    label_of = {name: label for label, name in enumerate(names)}
    if config.class_subset is not None:
        label_of = {wnid: label_of[wnid] for wnid in _subset_wnids(config.class_subset)}
    unknown = [name for name in index.classes if name not in label_of]
    if unknown:
        raise UserError(_describe_unknown_folders(unknown, index, config))
    labels = np.array([label_of[name] for name in index.classes], np.int64)[index.labels]
    return replace(index, classes=tuple(wnids), labels=labels, fingerprint=_fingerprint(index, labels))


def match_by_name(index: ImageIndex, known: Sequence[str], weights: str) -> ImageIndex:
    """Return the index with the labels that the weights have for its class folders.

    Args:
        known: names of the weights' classes, in order; some may have no folder.
        weights: name of the weights, for error messages.
    """
    if index.classes == tuple(known):
        return index
    label_of = {name: label for label, name in enumerate(known)}
    unknown = [name for name in index.classes if name not in label_of]
    if unknown or index.label_sets is not None:
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        same = len(known) == len(index.classes)
        fix = ", or give match_classes=order if only the names differ" if same else ""
        raise UserError(
            f"data.root: {index.folder} has the class {(unknown or index.classes)[0]}{more}, which is none of the "
            f"{len(known)} classes of {weights} ({', '.join(known[:3])}, ...); rename or remove its folder{fix}"
        )
    labels = np.array([label_of[name] for name in index.classes], np.int64)[index.labels]
    return replace(index, classes=tuple(known), labels=labels, fingerprint=_fingerprint(index, labels))


def subset_mask(subset: ClassSubset) -> NDArray[np.bool_]:
    """Return bool [1000], true for the classes of ImageNet-1K that are in the subset."""
    return np.isin(_wnids(), _subset_wnids(subset))


def incompleteness(index: ImageIndex, config: DataConfig) -> str | None:
    """Return a warning if a test set does not have its published number of images and classes, otherwise None."""
    images, classes = len(index), index.num_labelled_classes
    expected = (config.expected_images or images, config.expected_classes or classes)
    if (images, classes) == expected:
        return None
    return (
        f"data={config.name}: {index.folder} has {images:,} images of {classes:,} classes to score, but the published "
        f"set has {expected[0]:,} of {expected[1]:,}; do not compare the result with published ones"
    )


def data_set_name(index: ImageIndex, config: DataConfig) -> str:
    """Return a data set's name for results: `data.name`, or the folder's if that is the default and does not apply."""
    if config.name == DataConfig.name and len(index.classes) != 1000:
        return Path(config.root).absolute().name
    return config.name


def class_counts(index: ImageIndex, config: DataConfig) -> dict[str, int]:
    """Return fields for the result: the number of classes scored, and the published counts of a test set."""
    published = {"expected_images": config.expected_images, "expected_classes": config.expected_classes}
    return {
        "classes": index.num_labelled_classes,
        **{name: count for name, count in published.items() if count is not None},
    }


def _with_real_labels(index: ImageIndex) -> ImageIndex:
    real_labels: list[list[int]] = json.loads(_timm_file("imagenet_real_labels.json"))  # image 1 first
    sets = [tuple(sorted(real_labels[number - 1])) for number in _validation_numbers(index, len(real_labels))]
    scored = np.flatnonzero([bool(labels) for labels in sets])
    if not len(scored):
        raise UserError(
            f"data.labels=real: no image in {index.folder.absolute()} has a ReaL label; "
            "give ImageNet's complete validation set"
        )
    distinct = sorted({sets[sample] for sample in scored})
    row_of = {labels: row for row, labels in enumerate(distinct)}
    label_sets = np.full((len(distinct), max(map(len, distinct))), -1, np.int64)
    for row, labels in enumerate(distinct):
        label_sets[row, : len(labels)] = labels
    rows = np.array([row_of[sets[sample]] for sample in scored], np.int64)
    return replace(
        index.select(scored),
        classes=tuple(_wnids()),
        labels=rows,
        fingerprint=_fingerprint(index, scored, label_sets[rows]),
        label_sets=label_sets,
    )


def _validation_numbers(index: ImageIndex, count: int) -> list[int]:
    """Return the numbers, from 1, in the file names of ImageNet's validation images."""
    numbers = []
    for sample in range(len(index)):
        match = _VALIDATION_IMAGE.fullmatch(PurePosixPath(index.name(sample)).stem)
        if match is None or not 1 <= int(match[1]) <= count:
            raise UserError(
                f"data.labels=real: {index.location(sample)} is not named like an ImageNet validation image, "
                f"ILSVRC2012_val_00000001.JPEG to ILSVRC2012_val_{count:08}.JPEG; use the original file names"
            )
        numbers.append(int(match[1]))
    return numbers


def _describe_unknown_folders(unknown: Sequence[str], index: ImageIndex, config: DataConfig) -> str:
    expected = "a number from 0 to 999" if config.labels is Labels.numbers else "a wnid of ImageNet-1K"
    if config.class_subset is not None:
        expected = f"one of {config.class_subset.value}'s {len(_subset_wnids(config.class_subset))} wnids"
    more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
    return (
        f"data.root: class folder {(index.folder / unknown[0]).absolute()}{more} is not named by {expected}, as "
        f"data={config.name} requires; give the folder that contains the class folders, or remove it"
    )


def _wnids() -> list[str]:
    wnids: list[str] = ImageNetInfo().label_names()
    return wnids


def _subset_wnids(subset: ClassSubset) -> list[str]:
    return _timm_file(f"{subset.value}_synsets.txt").split()


def _timm_file(name: str) -> str:
    content = pkgutil.get_data("timm.data", f"_info/{name}")
    assert content is not None
    return content.decode()


def _fingerprint(index: ImageIndex, *labels: NDArray[np.int64]) -> str:
    digest = hashlib.sha256(index.fingerprint.encode())
    for array in labels:
        digest.update(array.tobytes())
    return digest.hexdigest()

"""Reads images or folders of images that a user names, in threads; unreadable files are skipped."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaformer.data.index.files import EXTENSIONS, is_hidden
from metaformer.data.index.image_index import find_images
from metaformer.data.index.pixels import holds_pixels
from metaformer.data.index.shards import holds_shards
from metaformer.data.load.bad_file import BAD_FILE, DamagedShard, reason
from metaformer.data.load.image_bytes import ImageBytes, read_file
from metaformer.data.load.image_file import StoredImage
from metaformer.data.load.reader import ImageReader
from metaformer.data.plan.plan import BatchPlan


class ListedImage(NamedTuple):
    """An image's name, and a function that returns the stored image or raises an OSError."""

    name: str
    read: Callable[[], StoredImage]


class Unreadable(NamedTuple):
    """A file or folder that is skipped, and the reason."""

    name: str
    reason: str


class ReadImages(NamedTuple):
    """A batch of images that were read.

    Attributes:
        names: names of the B images that could be read, in the order of the list.
        pixels: uint8 [B, 3, S, S].
        unreadable: the files that could not be read; B may be 0.
    """

    names: list[str]
    pixels: Tensor
    unreadable: list[Unreadable]


def list_images(names: Sequence[str]) -> tuple[list[ListedImage], list[Unreadable]]:
    """Return the images that the user names, in the order given, and folders that cannot be read or have no images.

    A folder selects the image files in it and in all folders below, sorted, or the images of its shards. Any
    other name is taken as an image file, whatever its suffix, and opened only when it is read.
    """
    found: list[ListedImage] = []
    problems: list[Unreadable] = []
    for name in names:
        if not Path(name).is_dir():
            found.append(ListedImage(name, partial(read_file, os.fsencode(name))))
            continue
        try:
            below = list(_images_below(Path(name)))
        except OSError as error:
            problems.append(Unreadable(error.filename or name, reason(error)))
            continue
        found += below
        if not below:
            problems.append(Unreadable(name, f"no images in this folder; image suffixes are {' '.join(EXTENSIONS)}"))
    return found, problems


def _images_below(folder: Path) -> Iterator[ListedImage]:
    if holds_shards(folder) or holds_pixels(folder):
        index = find_images(folder)
        stored = ImageBytes(index)
        for sample in range(len(index)):
            yield ListedImage(index.location(sample), partial(stored.read, sample))
        return
    entries = sorted((entry for entry in folder.iterdir() if not is_hidden(entry.name)), key=lambda entry: entry.name)
    for entry in entries:
        if entry.is_dir():
            yield from _images_below(entry)
        elif entry.name.lower().endswith(EXTENSIONS):
            yield ListedImage(str(entry), partial(read_file, os.fsencode(entry)))


def read_listed(
    images: Sequence[ListedImage],
    reader: ImageReader[Any],
    plan: BatchPlan,
    batch_size: int,
    threads: int,
) -> Iterator[ReadImages]:
    """Yield the images in batches of up to `batch_size`; threads read the next batch meanwhile.

    Args:
        reader: makes images from stored ones.
        plan: the plan of an evaluation batch, whose geometry is used for all images.
    """

    def make(image: ListedImage) -> Tensor | Unreadable:
        try:
            return reader.read(image.read(), plan, 0)
        except BAD_FILE as error:
            return Unreadable(image.name, str(error) if isinstance(error, DamagedShard) else reason(error))

    batches = [images[first : first + batch_size] for first in range(0, len(images), batch_size)]
    with ThreadPoolExecutor(threads) as pool:
        pending: list[list[Future[Tensor | Unreadable]]] = []
        for position, batch in enumerate(batches):
            for later in batches[position + len(pending) : position + 2]:
                pending.append([pool.submit(make, image) for image in later])
            results = [future.result() for future in pending.pop(0)]
            names = [image.name for image, result in zip(batch, results, strict=True) if isinstance(result, Tensor)]
            pixels = torch.empty(
                (len(names), 3, plan.image_size, plan.image_size), dtype=torch.uint8, memory_format=torch.channels_last
            )
            for row, result in enumerate(result for result in results if isinstance(result, Tensor)):
                pixels[row] = result
            yield ReadImages(names, pixels, [result for result in results if isinstance(result, Unreadable)])

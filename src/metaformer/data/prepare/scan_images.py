"""Scan that decodes every image of a data set on all cores, to find undecodable files before training."""

import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageFile

from metaformer.data.index.image_index import ImageIndex
from metaformer.data.load.bad_file import BAD_FILE, reason
from metaformer.data.load.image_bytes import ImageBytes
from metaformer.data.load.image_file import StoredImage, check_pixels, is_decoded, open_image
from metaformer.data.load.limits import MAX_PIXELS
from metaformer.data.prepare.processes import ProgressCallback, worker_processes

TINY = 32  # images with a shorter side below this many pixels are reported
CHUNK = 256  # images that a process decodes at a time
JPEG_SUFFIXES = (".jpg", ".jpeg")
GRAY = ("1", "L", "LA")
ROTATED = range(2, 9)  # EXIF orientations; 1 is upright
BAD_EXIF = (OSError, ValueError, SyntaxError, KeyError, TypeError, struct.error)


class ScannedImage(NamedTuple):
    """The result of decoding an image, a row of the manifest."""

    path: str  # below the data set's root
    width: int  # as stored, before any EXIF rotation; 0 if the file is not recognized as an image
    height: int
    mode: str  # as in PIL
    format: str  # as in PIL
    bytes: int
    ok: int  # 1 if the whole image decodes, otherwise 0
    unusual: str  # differences from a plain RGB JPEG, separated by ", "
    reason: str  # why the image is not ok


def scan_images(
    index: ImageIndex, split: str, workers: int, report: ProgressCallback, max_pixels: int = MAX_PIXELS
) -> Iterator[ScannedImage]:
    """Decode each image of a split and yield the results in the order of the index.

    Args:
        workers: number of processes.
        report: called with the progress.
        max_pixels: larger images are not ok, as in the loaders.
    """
    chunk = max(1, min(CHUNK, len(index) // (4 * workers)))
    parts = (np.arange(first, min(first + chunk, len(index))) for first in range(0, len(index), chunk))
    done = 0
    with worker_processes(workers) as pool:
        for images in pool.map(partial(_examine_all, split, max_pixels), [index.select(part) for part in parts]):
            yield from images
            done += len(images)
            report(f"decoding {split}", done, len(index))


def examine(path: str, read: Callable[[], StoredImage], max_pixels: int = MAX_PIXELS) -> ScannedImage:
    """Decode one image as the reference loader does, but JPEGs at an eighth of their size.

    Args:
        path: the path for the result.
        read: returns the image's encoded bytes or its pixels.
        max_pixels: as in `scan_images`.
    """
    size, shape, mode, format_, unusual = 0, (0, 0), "", "", ""
    stored: StoredImage | None = None
    try:
        stored = read()
        size = stored.nbytes
        if is_decoded(stored):
            height, width, _ = stored.shape
            shape, mode, format_ = (width, height), "RGB", "pixels"
            check_pixels(width, height, max_pixels)
            return ScannedImage(path, *shape, mode, format_, size, 1, "tiny" if min(shape) < TINY else "", "")
        with (
            warnings.catch_warnings(action="ignore"),
            open_image(stored, max_pixels) as image,
        ):  # bad EXIF, large images
            shape, mode, format_ = image.size, image.mode, str(image.format)
            unusual = ", ".join(_unusual(image, PurePosixPath(path).suffix.lower()))
            image.draft(None, (1, 1))  # still reads the whole file
            image.convert("RGB")
    except BAD_FILE as error:
        why = reason(error) if stored is None or size else "empty file"
        return ScannedImage(path, *shape, mode, format_, size, 0, unusual, why)
    return ScannedImage(path, *shape, mode, format_, size, 1, unusual, "")


def _unusual(image: ImageFile.ImageFile, suffix: str) -> Iterator[str]:
    if image.format != "JPEG":
        yield f"{image.format} named as a JPEG" if suffix in JPEG_SUFFIXES else str(image.format)
    raw_mode = str(image.tile[0].args) if image.tile else ""  # 16-bit PNGs also open as RGB
    if image.mode.startswith(("I", "F")) or ";16" in raw_mode:
        yield "16-bit"
    elif image.mode != "RGB":
        yield "gray" if image.mode in GRAY else image.mode
    if _orientation(image) in ROTATED:
        yield "EXIF-rotated"
    if min(image.size) < TINY:
        yield "tiny"


def _orientation(image: Image.Image) -> int | None:
    if "exif" not in image.info:
        return None
    try:
        orientation: int | None = image.getexif().get(ExifTags.Base.Orientation)
    except BAD_EXIF:  # loaders ignore EXIF data
        return None
    return orientation


def _examine_all(split: str, max_pixels: int, images: ImageIndex) -> list[ScannedImage]:
    with closing(ImageBytes(images)) as stored:
        names = [str(PurePosixPath(split, images.name(sample))) for sample in range(len(images))]
        return [examine(name, partial(stored.check, sample), max_pixels) for sample, name in enumerate(names)]

"""Decoding every image of a data set once, on all cores, to know beforehand what a loader would stop at."""

import os
import signal
import struct
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from metaformer.data.bad_file import BAD_FILE
from metaformer.data.index import ImageIndex
from metaformer.errors import UserError

TINY = 32  # pixels of the shorter side
CHUNK = 256  # images that a process decodes before it answers
JPEG_SUFFIXES = (".jpg", ".jpeg")
GRAY = ("1", "L", "LA")
ROTATED = range(2, 9)  # EXIF orientations; 1 is upright
BAD_EXIF = (OSError, ValueError, SyntaxError, KeyError, TypeError, struct.error)

Report = Callable[[int, int], None]  # how many images are done, of how many


class ScannedImage(NamedTuple):
    """A row of the manifest."""

    path: str  # below the data set's root
    width: int  # as stored, before a rotation that EXIF asks for; 0 where the file is not known as an image
    height: int
    mode: str  # PIL's
    format: str  # PIL's
    bytes: int
    ok: int  # 1: it decodes to its end
    unusual: str  # in what it differs from a plain RGB JPEG: words with ", " between
    reason: str  # why it is not ok


def scan_images(index: ImageIndex, split: str, workers: int, report: Report) -> Iterator[ScannedImage]:
    """Decode each image of a split, in the index's order.

    Args:
        workers: processes.
        report: called as the work goes on.

    Raises:
        UserError: a process died.
    """
    chunk = max(1, min(CHUNK, len(index) // (4 * workers)))
    chunks = [np.array(index.paths[first : first + chunk]) for first in range(0, len(index), chunk)]
    examine = partial(_examine_chunk, index.folder.absolute(), split)
    done = 0
    context = get_context("spawn")  # a fork copies locks that the progress bar's thread may hold
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare_worker) as pool:
        try:
            for images in pool.map(examine, chunks):
                yield from images
                done += len(images)
                report(done, len(index))
        except BrokenProcessPool as error:
            raise UserError(f"{index.folder}: a process died after image {done:,}, as for lack of memory; "
                            "give fewer --workers") from error  # fmt: skip
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def examine(file: Path, path: str) -> ScannedImage:
    """Decode one file as the reference loader does, at an eighth of its size where it is a JPEG.

    Args:
        path: what the row calls it.
    """
    size, shape, mode, format_, unusual = 0, (0, 0), "", "", ""
    try:
        size = file.stat().st_size
        with warnings.catch_warnings(action="ignore"), Image.open(file) as image:  # damaged EXIF, large images
            shape, mode, format_ = image.size, image.mode, str(image.format)
            unusual = ", ".join(_unusual(image, file.suffix.lower()))
            image.draft(None, (1, 1))  # the whole file is read all the same
            image.convert("RGB")
    except BAD_FILE as error:
        return ScannedImage(path, *shape, mode, format_, size, 0, unusual, _reason(error, size))
    return ScannedImage(path, *shape, mode, format_, size, 1, unusual, "")


def _unusual(image: ImageFile.ImageFile, suffix: str) -> Iterator[str]:
    if image.format != "JPEG":
        yield f"{image.format} named as a JPEG" if suffix in JPEG_SUFFIXES else str(image.format)
    raw_mode = str(image.tile[0].args) if image.tile else ""  # PNGs of 16 bits open as RGB too
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
    except BAD_EXIF:  # of no concern to a loader
        return None
    return orientation


def _reason(error: BaseException, size: int) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image" if size else "empty file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())


def _examine_chunk(folder: Path, split: str, paths: NDArray[np.uint8]) -> list[ScannedImage]:
    names = [os.fsdecode(row.tobytes().rstrip(b"\0")) for row in paths]
    return [examine(folder / name, str(PurePosixPath(split, name))) for name in names]


def _prepare_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes; the first one ends the others

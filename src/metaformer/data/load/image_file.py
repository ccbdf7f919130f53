"""Opening and decoding of image files, with limits on their format and size."""

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from metaformer.data.load.bad_file import BAD_FILE
from metaformer.data.load.limits import MAX_PIXELS
from metaformer.data.plan.geometry import Box

Encoded = NDArray[np.uint8]  # [bytes]
PixelArray = NDArray[np.uint8]  # RGB, [H, W, 3]; may be a read-only view of a file, so cut out what is needed
StoredImage = NDArray[np.uint8]  # Encoded, or a PixelArray

# PIL's format names. Its other readers are never tried, because one of them passes the file's content to Ghostscript.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
JPEG_START = b"\xff\xd8"

# JPEG markers (ITU-T T.81, table B.1)
_FRAME_MARKERS = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_MARKERS_WITHOUT_LENGTH = {0x01, *range(0xD0, 0xDA)}
_EXIF, _ADOBE, _SCAN = 0xE1, 0xEE, 0xDA


class JpegHeader(NamedTuple):
    """Properties of a JPEG from the markers before its pixels."""

    width: int
    height: int
    components: int
    adobe: bool  # has Adobe's marker, which specifies the colour encoding
    exif: bool  # has EXIF data, which may ask for a rotation


@contextmanager
def open_image(encoded: Encoded | bytes, max_pixels: int = MAX_PIXELS) -> Iterator[ImageFile.ImageFile]:
    """Open an image with PIL and read its header; decode it within the `with` block.

    Raises:
        OSError, ValueError, ...: one of BAD_FILE: the image is damaged, too large, or not in a supported format. Any
            other exception that PIL raises for a damaged file becomes a ValueError.
    """
    Image.MAX_IMAGE_PIXELS = None  # the limit below is the same for all loaders
    try:
        with Image.open(BytesIO(encoded if isinstance(encoded, bytes) else encoded.data), formats=FORMATS) as image:
            check_pixels(*image.size, max_pixels)
            yield image
    except BAD_FILE:
        raise
    except Exception as error:  # IndexError, struct.error, OverflowError, MemoryError, ...
        raise ValueError(f"{type(error).__name__}: {error}") from error


def decode_rgb(encoded: Encoded | bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image with PIL, whose conversion to RGB is the reference for all loaders. Ignores EXIF orientation.

    Raises:
        OSError, ValueError, ...: as `open_image`.
    """
    with open_image(encoded, max_pixels) as image:
        return image.convert("RGB")


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    """Raise a ValueError for an image with more than `max_pixels`, which would take too much memory."""
    if width * height > max_pixels:
        raise ValueError(
            f"{width:,} x {height:,} pixels, more than loader.max_pixels={max_pixels}; raise the limit if intended"
        )


def jpeg_header(encoded: Encoded) -> JpegHeader | None:
    """Read the header of a JPEG without PIL, in microseconds.

    Returns:
        None if this is not a JPEG, or a JPEG with a damaged header.
    """
    content, adobe, exif, frame, pos = encoded.data, False, False, None, 2
    if bytes(content[:2]) != JPEG_START:
        return None
    while pos + 10 <= len(content) and content[pos] == 0xFF:
        marker = content[pos + 1]
        if marker == 0xFF or marker in _MARKERS_WITHOUT_LENGTH:
            pos += 1 if marker == 0xFF else 2
            continue
        if marker == _SCAN:
            break
        if marker in _FRAME_MARKERS:
            if frame is not None:
                return None
            height, width = content[pos + 5] << 8 | content[pos + 6], content[pos + 7] << 8 | content[pos + 8]
            frame = (width, height, content[pos + 9])
        adobe |= marker == _ADOBE and bytes(content[pos + 4 : pos + 9]) == b"Adobe"
        exif |= marker == _EXIF and bytes(content[pos + 4 : pos + 8]) == b"Exif"
        pos += 2 + (content[pos + 2] << 8 | content[pos + 3])
    return None if frame is None else JpegHeader(*frame, adobe, exif)


def is_decoded(image: StoredImage) -> bool:
    """Return whether a stored image is an array of pixels."""
    return image.ndim == 3


def cut_out(pixels: PixelArray, box: Box) -> PixelArray:
    """Return a contiguous copy of a region; of a mapped file, only its rows are read."""
    return pixels[box.top : box.top + box.height, box.left : box.left + box.width].copy()


def read_ahead(pixels: PixelArray, box: Box) -> None:
    """Make the kernel start to read the rows of a region of a mapped image, and return at once.

    Without this, the kernel reads far around each page that is missing when the region is cut out.
    """
    rows, mapped = pixels[box.top : box.top + box.height], pixels.base
    assert isinstance(mapped, mmap.mmap)
    start = rows.ctypes.data - np.frombuffer(mapped, np.uint8, 1).ctypes.data
    page = start % mmap.PAGESIZE  # madvise takes whole pages
    mapped.madvise(mmap.MADV_WILLNEED, start - page, rows.nbytes + page)


def has_plain_pixels(image: ImageFile.ImageFile) -> bool:
    """Return whether an opened image has 8-bit gray or RGB values, which all decoders read in the same way."""
    raw_mode = str(image.tile[0].args) if image.tile else ""  # 16-bit PNGs also open as RGB
    return image.mode in ("L", "RGB") and ";16" not in raw_mode and "transparency" not in image.info


def as_ppm(image: Image.Image) -> Encoded:
    """Return an RGB image as the bytes of a PPM file: a short header followed by the pixels."""
    return np.frombuffer(b"P6 %d %d 255\n" % image.size + image.tobytes(), np.uint8)

"""Opening image files: which kinds are read, and how large an image may be."""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from metaformer.data.load.bad_file import BAD_FILE

Encoded = NDArray[np.uint8]  # [bytes]

# PIL's names. Its other readers are never tried: one of them hands a file's content to Ghostscript.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
MAX_PIXELS = 100_000_000  # 300 MB as RGB; ImageNet's largest image has 38,451,400
JPEG_START = b"\xff\xd8"

_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # markers of JPEG frame headers (ITU-T T.81, table B.1)
_ALONE = {0x01, *range(0xD0, 0xDA)}  # markers that no length follows
_ADOBE, _SCAN = 0xEE, 0xDA


class JpegHeader(NamedTuple):
    """What a JPEG says of itself before its pixels."""

    width: int
    height: int
    components: int
    adobe: bool  # Adobe's marker says how its colours are meant


@contextmanager
def open_image(encoded: Encoded | bytes, max_pixels: int = MAX_PIXELS) -> Iterator[ImageFile.ImageFile]:
    """A PIL image whose header has been read; decode it within the block.

    Raises:
        OSError, ValueError, ...: one of BAD_FILE: the image is damaged, of a kind that is not read, or too large. What
            else PIL raises for a damaged file becomes a ValueError.
    """
    Image.MAX_IMAGE_PIXELS = None  # the limit is checked below, at one number for all loaders
    try:
        with Image.open(BytesIO(encoded if isinstance(encoded, bytes) else encoded.data), formats=FORMATS) as image:
            check_pixels(*image.size, max_pixels)
            yield image
    except BAD_FILE:
        raise
    except Exception as error:  # IndexError, struct.error, OverflowError, MemoryError, ...
        raise ValueError(f"{type(error).__name__}: {error}") from error


def decode_rgb(encoded: Encoded | bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode with PIL, whose conversion to RGB is the reference for all loaders; EXIF orientation is ignored.

    Raises:
        OSError, ValueError, ...: as `open_image`.
    """
    with open_image(encoded, max_pixels) as image:
        return image.convert("RGB")


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    """Refuse an image that would take too much memory.

    Raises:
        ValueError: it has more than `max_pixels`.
    """
    if width * height > max_pixels:
        raise ValueError(f"{width:,} x {height:,} pixels, more than loader.max_pixels={max_pixels}; raise it if meant")


def jpeg_header(encoded: Encoded) -> JpegHeader | None:
    """Read a JPEG's header, without PIL: in microseconds.

    Returns:
        None where this is no JPEG, or one whose header is damaged.
    """
    content, adobe, frame, at = encoded.data, False, None, 2
    if bytes(content[:2]) != JPEG_START:
        return None
    while at + 10 <= len(content) and content[at] == 0xFF:
        marker = content[at + 1]
        if marker == 0xFF or marker in _ALONE:
            at += 1 if marker == 0xFF else 2
            continue
        if marker == _SCAN:
            break
        if marker in _FRAMES:
            if frame is not None:
                return None
            frame = (content[at + 7] << 8 | content[at + 8], content[at + 5] << 8 | content[at + 6], content[at + 9])
        adobe |= marker == _ADOBE and bytes(content[at + 4 : at + 9]) == b"Adobe"
        at += 2 + (content[at + 2] << 8 | content[at + 3])
    return None if frame is None else JpegHeader(*frame, adobe)


def has_plain_pixels(image: ImageFile.ImageFile) -> bool:
    """Whether an opened image holds gray or RGB values of 8 bits, which every decoder reads alike."""
    raw_mode = str(image.tile[0].args) if image.tile else ""  # PNGs of 16 bits open as RGB too
    return image.mode in ("L", "RGB") and ";16" not in raw_mode and "transparency" not in image.info


def as_ppm(image: Image.Image) -> Encoded:
    """An RGB image as the bytes of a PPM file, which are its pixels behind a short header."""
    return np.frombuffer(b"P6 %d %d 255\n" % image.size + image.tobytes(), np.uint8)

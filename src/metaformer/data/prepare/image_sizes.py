"""Reads the sizes of images from the first bytes of each file."""

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from metaformer.data.load.bad_file import BAD_FILE, describe_bad_file
from metaformer.data.load.image_file import check_pixels, jpeg_header, open_image
from metaformer.data.load.limits import MAX_PIXELS
from metaformer.data.prepare.source_images import SourceImage, read_source_images
from metaformer.errors import UserError

HEAD = 32 * 1024  # bytes of a JPEG that contain its size, unless it has large metadata


class ImageSize(NamedTuple):
    """Width and height in pixels."""

    width: int
    height: int


def read_sizes(sources: Sequence[SourceImage]) -> list[ImageSize]:
    """Return the sizes of images; an error names the file, or the place in an archive, that cannot be read."""
    return [_size_of_jpeg(source) or _size(source) for source in sources]


def _size_of_jpeg(source: SourceImage) -> ImageSize | None:
    """Return the size of a JPEG; None for other formats, metadata longer than HEAD, and damaged files."""
    try:
        descriptor = os.open(source.file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            head = os.pread(descriptor, min(HEAD, source.size), source.offset)
        finally:
            os.close(descriptor)
    except OSError:
        return None
    header = jpeg_header(np.frombuffer(head, np.uint8))
    if header is None or header.width * header.height > MAX_PIXELS or not header.width * header.height:
        return None
    return ImageSize(header.width, header.height)


def _size(source: SourceImage) -> ImageSize:
    ((_, content),) = read_source_images([source])
    try:
        with open_image(content) as image:
            check_pixels(*image.size, MAX_PIXELS)
            return ImageSize(*image.size)
    except BAD_FILE as error:
        raise UserError(describe_bad_file(source.location, error)) from error

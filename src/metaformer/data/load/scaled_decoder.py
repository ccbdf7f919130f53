"""Decoding of JPEGs at a half, a quarter or an eighth of their size, for crops that are reduced by more (not exact)."""

import numpy as np
import torch
from torch import Tensor

from metaformer.data.load.image_file import Encoded, jpeg_header, open_image
from metaformer.data.load.jpeg_decoder import DecodeRegion, region_decoder
from metaformer.data.plan.geometry import Box

# By scale: the share of the image's area from which this is faster than exact decoding of the region alone.
MIN_SHARE = {8: 0.5, 4: 0.5, 2: 0.75}


def decode_scaled(encoded: Encoded, box: Box, size: int, exact: DecodeRegion | None) -> Tensor | None:
    """Decode a region that will be resized to `size`, at a reduced size if that is faster. See `DecodeRegion`.

    The reduced region's edges are rounded to whole pixels, so they move by up to half a pixel of the resized image.

    Args:
        exact: decodes all other regions; None takes the best decoder that is installed.
    """
    header = jpeg_header(encoded)
    scale = 1 if header is None else choose_scale(box, header.width, header.height, size)
    if header is None or scale == 1:
        return (exact or region_decoder())(encoded, box)
    with open_image(encoded, header.width * header.height) as image:
        image.draft(None, (image.width // scale, image.height // scale))
        pixels = np.array(image.convert("RGB"))
    left, top, right, bottom = ((2 * corner + scale) // (2 * scale) for corner in box.corners)
    return torch.from_numpy(pixels[top:bottom, left:right].copy()).permute(2, 0, 1)


def choose_scale(box: Box, width: int, height: int, size: int) -> int:
    """Return the largest reduction, 8, 4 or 2, that leaves both sides at least `size`; 1 if none is faster."""
    scale = next((scale for scale in MIN_SHARE if min(box.width, box.height) >= scale * size), 1)
    return scale if box.width * box.height >= MIN_SHARE.get(scale, 0.0) * width * height else 1

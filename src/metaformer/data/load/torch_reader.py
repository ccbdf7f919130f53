"""Image reader based on uint8 tensors, the fastest on a CPU and nearly pixel-equal to PIL.

Of JPEGs, only the region to be resized is decoded, where the decoder can (`jpeg_decoder`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from metaformer.data.load.image_file import (
    PixelArray,
    StoredImage,
    check_pixels,
    cut_out,
    decode_rgb,
    is_decoded,
    jpeg_header,
)
from metaformer.data.load.jpeg_decoder import DecodeRegion, region_decoder
from metaformer.data.load.limits import MAX_PIXELS
from metaformer.data.load.reader import ImageReader
from metaformer.data.load.scaled_decoder import decode_scaled
from metaformer.data.plan.geometry import Box, resize_and_center_crop
from metaformer.data.plan.plan import BatchPlan
from metaformer.data.plan.randaugment import apply_operations


@dataclass(frozen=True)
class TorchReader(ImageReader[Tensor]):
    """Makes images with torch; regions are uint8 [3, H, W].

    Attributes:
        max_pixels: larger images are rejected.
        decoder: of JPEGs; None takes the best that is installed.
        scaled: decode random crops that are reduced to a half or less at a smaller scale, which is not exact.
    """

    max_pixels: int = MAX_PIXELS
    decoder: DecodeRegion | None = None
    scaled: bool = False

    def decode(self, stored: StoredImage, plan: BatchPlan, row: int) -> Tensor:
        decoder = self.decoder
        if self.scaled and plan.crop is not None:
            decoder = partial(decode_scaled, size=plan.image_size, exact=decoder)
        (width, height), cut = open_stored(stored, self.max_pixels, decoder)
        return cut(plan.region(row, width, height))

    def augment(self, region: Tensor, plan: BatchPlan, row: int) -> Tensor:
        size = plan.image_size
        if plan.crop is None:
            resize = resize_and_center_crop(region.shape[2], region.shape[1], plan.resize_to, size)
            image = _resize(region, resize.height, resize.width, plan.bicubic)
            image = image[:, resize.top : resize.top + size, resize.left : resize.left + size]
        else:
            image = _resize(region, size, size, bool(plan.crop.bicubic[row]))
            if plan.crop.flip[row]:
                image = image.flip(-1)
        operations = plan.randaugment.operations_for(row) if plan.randaugment is not None else []
        if operations:  # PIL's functions on the small image are exact, and faster than transforms.v2 on tensors
            pixels = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
            image = torch.from_numpy(np.array(apply_operations(pixels, operations))).permute(2, 0, 1)
        return image


def open_stored(
    stored: StoredImage, max_pixels: int = MAX_PIXELS, decode: DecodeRegion | None = None
) -> tuple[tuple[int, int], Callable[[Box], Tensor]]:
    """Return an image's width and height, and a function that cuts a region out of it: uint8 [3, H, W].

    Raises:
        OSError, ValueError, ...: one of BAD_FILE: the image cannot be decoded, or has more than `max_pixels`. So does
            the function.
    """
    if is_decoded(stored):
        height, width, _ = stored.shape
        check_pixels(width, height, max_pixels)
        return (width, height), lambda box: _as_tensor(cut_out(stored, box))
    header = jpeg_header(stored)
    if header is None or header.components not in (1, 3):  # PIL's conversion is the reference for all other files
        whole = np.array(decode_rgb(stored, max_pixels))
        height, width, _ = whole.shape
        return (width, height), lambda box: _as_tensor(cut_out(whole, box))
    check_pixels(header.width, header.height, max_pixels)
    decode = decode or region_decoder()

    def cut(box: Box) -> Tensor:
        region = decode(stored, box)
        if region is None:  # PIL reads it, or raises a clear error
            region = _as_tensor(np.array(decode_rgb(stored, max_pixels).crop(box.corners)))
        return region

    return (header.width, header.height), cut


def _as_tensor(pixels: PixelArray) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _resize(image: Tensor, height: int, width: int, bicubic: bool) -> Tensor:
    """Resize uint8 [3, H, W] to [3, height, width] with antialiasing; interleaved pixels stay interleaved."""
    # These strides are those of a channels-last batch of one; with the strides of image[None] torch would split planes.
    batch = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    return interpolate(batch, (height, width), mode="bicubic" if bicubic else "bilinear", antialias=True)[0]

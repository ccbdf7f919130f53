"""Image reader based on torchvision and uint8 tensors, the fastest on a CPU and nearly pixel-equal to PIL."""

from collections.abc import Callable
from contextlib import suppress

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.io import ImageReadMode, decode_image

from metaformer.data.load.image_file import (
    MAX_PIXELS,
    Encoded,
    StoredImage,
    check_pixels,
    cut_out,
    decode_rgb,
    is_decoded,
    jpeg_header,
)
from metaformer.data.plan.geometry import Box, central_part, random_resized_crop, resize_and_center_crop
from metaformer.data.plan.plan import BatchPlan
from metaformer.data.plan.randaugment import apply_operations


def read_with_torch(stored: StoredImage, plan: BatchPlan, row: int, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode, crop, resize, flip and augment the plan's image at position `row`; return uint8 [3, S, S].

    Raises:
        OSError, ValueError, ...: one of BAD_FILE: the image cannot be decoded, or has more than `max_pixels`.
    """
    (width, height), cut = _open(stored, max_pixels)
    size = plan.image_size
    if plan.crop is None:
        part = central_part(width, height) or Box(0, 0, width, height)
        resize = resize_and_center_crop(part.width, part.height, plan.resize_to, size)
        image = _resize(cut(part), resize.height, resize.width, plan.bicubic)
        image = image[:, resize.top : resize.top + size, resize.left : resize.left + size]
    else:
        crop = plan.crop
        box = random_resized_crop(crop.tries[row], crop.position[row], crop.aspects, width, height)
        image = _resize(cut(box), size, size, bool(crop.bicubic[row]))
        if crop.flip[row]:
            image = image.flip(-1)
    operations = plan.randaugment.operations_for(row) if plan.randaugment is not None else []
    if operations:  # PIL's functions on the small image are exact, and faster than transforms.v2 on tensors
        pixels = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        image = torch.from_numpy(np.array(apply_operations(pixels, operations))).permute(2, 0, 1)
    return image


def _open(stored: StoredImage, max_pixels: int) -> tuple[tuple[int, int], Callable[[Box], Tensor]]:
    """Return an image's width and height, and a function that cuts a region out of it: uint8 [3, H, W]."""
    if is_decoded(stored):
        height, width, _ = stored.shape
        check_pixels(width, height, max_pixels)
        return (width, height), lambda box: torch.from_numpy(cut_out(stored, box)).permute(2, 0, 1)
    image = _decode(stored, max_pixels)
    height, width = image.shape[-2:]
    return (width, height), lambda box: image[:, box.top : box.top + box.height, box.left : box.left + box.width]


def _resize(image: Tensor, height: int, width: int, bicubic: bool) -> Tensor:
    """Resize uint8 [3, H, W] to [3, height, width] with antialiasing; interleaved pixels stay interleaved."""
    # These strides are those of a channels-last batch of one; with the strides of image[None] torch would split planes.
    batch = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    return interpolate(batch, (height, width), mode="bicubic" if bicubic else "bilinear", antialias=True)[0]


def _decode(encoded: Encoded, max_pixels: int) -> Tensor:
    """Decode to RGB, uint8 [3, H, W]. Ignores EXIF orientation, as PIL and timm do."""
    header = jpeg_header(encoded)  # JPEGs only: torchvision crashes on broken PNGs and reads palettes as gray
    if header is not None and header.components in (1, 3):
        check_pixels(header.width, header.height, max_pixels)
        with suppress(RuntimeError):  # for a broken file, PIL raises a clearer error below
            image: Tensor = decode_image(torch.from_numpy(encoded), ImageReadMode.UNCHANGED)
            if image.shape[0] == 3:
                return image
            if image.shape[0] == 1:
                return image.expand(3, -1, -1)
    pixels = np.array(decode_rgb(encoded, max_pixels))  # not a JPEG, or CMYK: PIL's conversion is the reference
    return torch.from_numpy(pixels).permute(2, 0, 1)

"""Image reader based on PIL, the reference for the other loaders."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from metaformer.data.load.image_file import StoredImage, check_pixels, cut_out, decode_rgb, is_decoded
from metaformer.data.load.limits import MAX_PIXELS
from metaformer.data.load.reader import ImageReader
from metaformer.data.plan.geometry import Box, resize_and_center_crop
from metaformer.data.plan.plan import BatchPlan
from metaformer.data.plan.randaugment import apply_operations


@dataclass(frozen=True)
class PilReader(ImageReader[Image.Image]):
    """Makes images with PIL.

    Attributes:
        max_pixels: larger images are rejected.
    """

    max_pixels: int = MAX_PIXELS

    def decode(self, stored: StoredImage, plan: BatchPlan, row: int) -> Image.Image:
        (width, height), cut = _open(stored, self.max_pixels)
        return cut(plan.region(row, width, height))

    def augment(self, region: Image.Image, plan: BatchPlan, row: int) -> Tensor:
        size = plan.image_size
        if plan.crop is None:
            resize = resize_and_center_crop(*region.size, plan.resize_to, size)
            image = region.resize((resize.width, resize.height), _filter(plan.bicubic))
            image = image.crop((resize.left, resize.top, resize.left + size, resize.top + size))
        else:
            image = region.resize((size, size), _filter(bool(plan.crop.bicubic[row])))
            if plan.crop.flip[row]:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if plan.randaugment is not None:
            image = apply_operations(image, plan.randaugment.operations_for(row))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _open(stored: StoredImage, max_pixels: int) -> tuple[tuple[int, int], Callable[[Box], Image.Image]]:
    """Return an image's width and height, and a function that cuts a region out of it."""
    if is_decoded(stored):
        height, width, _ = stored.shape
        check_pixels(width, height, max_pixels)
        return (width, height), lambda box: Image.fromarray(cut_out(stored, box))
    image = decode_rgb(stored, max_pixels)
    return image.size, lambda box: image.crop(box.corners)


def _filter(bicubic: bool) -> Image.Resampling:
    return Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR

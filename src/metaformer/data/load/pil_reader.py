"""Image reader based on PIL and timm's operations, the reference for the other loaders."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from metaformer.data.load.image_file import MAX_PIXELS, Encoded, decode_rgb
from metaformer.data.plan.geometry import central_part, random_resized_crop, resize_and_center_crop
from metaformer.data.plan.plan import BatchPlan
from metaformer.data.plan.randaugment import apply_operations


def read_with_pil(encoded: Encoded, plan: BatchPlan, row: int, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode, crop, resize, flip and augment the plan's image at position `row`; return uint8 [3, S, S].

    Raises:
        OSError, ValueError, ...: one of BAD_FILE: the image cannot be decoded, or has more than `max_pixels`.
    """
    image = decode_rgb(encoded, max_pixels)
    size = plan.image_size
    if plan.crop is None:
        part = central_part(*image.size)
        if part is not None:
            image = image.crop(part.corners)
        resize = resize_and_center_crop(*image.size, plan.resize_to, size)
        image = image.resize((resize.width, resize.height), _filter(plan.bicubic))
        image = image.crop((resize.left, resize.top, resize.left + size, resize.top + size))
    else:
        crop = plan.crop
        box = random_resized_crop(crop.tries[row], crop.position[row], crop.aspects, *image.size)
        image = image.crop(box.corners)
        image = image.resize((size, size), _filter(bool(crop.bicubic[row])))
        if crop.flip[row]:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if plan.randaugment is not None:
        image = apply_operations(image, plan.randaugment.operations_for(row))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _filter(bicubic: bool) -> Image.Resampling:
    return Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR

"""Crop and resize geometry of single images: the formulas of torchvision and timm in float64.

The DALI pipeline computes the same formulas in its graph; tests check that the two agree.
"""

import math
from typing import NamedTuple

from metaformer.data.plan.draws import Float64

MAX_ASPECT = 64  # long side / short side, above which an image is cut before evaluation resizes it


class Box(NamedTuple):
    """A rectangle in pixels."""

    left: int
    top: int
    width: int
    height: int

    @property
    def corners(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom, as PIL's `crop` takes them."""
        return self.left, self.top, self.left + self.width, self.top + self.height


class Resize(NamedTuple):
    """Target size for the whole image, and the top-left corner of the crop in the resized image, in pixels."""

    width: int
    height: int
    left: int
    top: int


def random_resized_crop(
    tries: Float64, position: Float64, aspects: tuple[float, float], width: int, height: int
) -> Box:
    """Return the first tried rectangle that fits in the image, or the largest centred one of an allowed aspect.

    Args:
        tries: [T, 2], each row sqrt(area * aspect) and sqrt(area / aspect), with area as a share of the image's area.
        position: [2], horizontal and vertical position of the rectangle within its free range, in [0, 1).
        aspects: minimum and maximum width / height of the centred rectangle.
        width, height: the image's size in pixels.
    """
    scale = math.sqrt(width * height)
    for width_share, height_share in tries:
        w, h = math.floor(scale * width_share + 0.5), math.floor(scale * height_share + 0.5)
        if 0 < w <= width and 0 < h <= height:
            return Box(math.floor(position[0] * (width - w + 1)), math.floor(position[1] * (height - h + 1)), w, h)
    w = min(width, math.floor(height * aspects[1] + 0.5))
    h = min(height, math.floor(width / aspects[0] + 0.5))
    return Box((width - w) // 2, (height - h) // 2, w, h)


def resize_and_center_crop(width: int, height: int, resize_to: int, image_size: int) -> Resize:
    """Return the geometry of resizing the short side to `resize_to` and cropping the centre, rounded as torchvision."""
    short = min(width, height)
    new_width, new_height = resize_to * width // short, resize_to * height // short
    return Resize(new_width, new_height, round((new_width - image_size) / 2), round((new_height - image_size) / 2))


def central_part(width: int, height: int) -> Box | None:
    """Return the part of a very elongated image that evaluation resizes, so that a small file cannot take gigabytes.

    The long side is cut around the centre to MAX_ASPECT times the short side, far more than a centre crop needs.

    Returns:
        The part, or None if the image is resized whole.
    """
    max_side = MAX_ASPECT * min(width, height)
    if max(width, height) <= max_side:
        return None
    left, top = max(0, width - max_side) // 2, max(0, height - max_side) // 2
    return Box(left, top, width - 2 * left, height - 2 * top)


def evaluation_resize(image_size: int, crop_pct: float) -> int:
    """Return the length of the short side before the centre crop: 248 for 224 at 0.9, 235 at 0.95."""
    return math.floor(image_size / crop_pct)

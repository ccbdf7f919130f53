"""Which pixels of an image a crop takes: the formulas of torchvision and timm, in float64, for single images.

The DALI pipeline computes the same formulas inside its graph; tests hold the two together.
"""

import math
from typing import NamedTuple

from metaformer.data.plan.draws import Float64

MOST_ASPECT = 64  # of an image that is resized whole


class Box(NamedTuple):
    """A rectangle in pixels."""

    left: int
    top: int
    width: int
    height: int

    @property
    def corners(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom: what PIL crops by."""
        return self.left, self.top, self.left + self.width, self.top + self.height


class Resize(NamedTuple):
    """A size to resize a whole image to, and where the crop then starts; pixels."""

    width: int
    height: int
    left: int
    top: int


def random_resized_crop(
    tries: Float64, position: Float64, aspects: tuple[float, float], width: int, height: int
) -> Box:
    """The first of the tried rectangles that fits in the image, else the largest centred one of an allowed aspect.

    Args:
        tries: [T, 2], each row sqrt(area * aspect) and sqrt(area / aspect), area as a share of the image's.
        position: [2], where the rectangle lies in the room it has, horizontally and vertically, in [0, 1).
        aspects: least and largest width / height of the centred rectangle.
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
    """Resize the short side to `resize_to` and take the centre; truncation and rounding are torchvision's."""
    short = min(width, height)
    new_width, new_height = resize_to * width // short, resize_to * height // short
    return Resize(new_width, new_height, round((new_width - image_size) / 2), round((new_height - image_size) / 2))


def central_part(width: int, height: int) -> Box | None:
    """The part of a very long image that evaluation resizes, so that a small file cannot take gigabytes.

    The long side is cut to MOST_ASPECT times the short one, around the centre: far more than a centre crop needs.

    Returns:
        None for all other images, which are resized whole.
    """
    longest = MOST_ASPECT * min(width, height)
    if max(width, height) <= longest:
        return None
    left, top = max(0, width - longest) // 2, max(0, height - longest) // 2
    return Box(left, top, width - 2 * left, height - 2 * top)


def evaluation_resize(image_size: int, crop_pct: float) -> int:
    """The short side before the centre crop: 248 for 224 at 0.9, 235 at 0.95."""
    return math.floor(image_size / crop_pct)

"""Triton kernel that normalizes, mixes and erases a batch in one pass: 1 byte read twice and 4 written per value.

It computes what the plain functions of `transform` compute, except for rounding.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # values of one image per program; a value is one colour of one pixel


@triton.jit
def _hash32(x):
    """Return lowbias32 of uint32, as in `transform`."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _inside(boxes, number, y, x):
    """Return whether positions are inside box `number` (top, left, bottom, right)."""
    top, left = tl.load(boxes + 4 * number).to(tl.int32), tl.load(boxes + 4 * number + 1).to(tl.int32)
    bottom, right = tl.load(boxes + 4 * number + 2).to(tl.int32), tl.load(boxes + 4 * number + 3).to(tl.int32)
    return (y >= top) & (y < bottom) & (x >= left) & (x < right)


@triton.jit
def _of_colour(values, colour):
    """Return for each colour its one of three values; loading it from memory takes more instructions."""
    red, green, blue = tl.load(values), tl.load(values + 1), tl.load(values + 2)
    return tl.where(colour == 0, red, tl.where(colour == 1, green, blue))


@triton.jit
def _normal(key, position):
    """Return the noise of `counter_normal`: a hash of key and position, then the Box-Muller transform."""
    state = _hash32(key.to(tl.uint32) ^ _hash32(position.to(tl.uint32)))
    radius = (state.to(tl.int64) + 1).to(tl.float32) * 2.3283064365386963e-10  # 2^-32
    turn = _hash32(state ^ 0x9E3779B9).to(tl.float32) * 2.3283064365386963e-10 - 0.5  # the angle is 2 pi turn + pi
    return tl.sqrt(-2 * tl.log(radius)) * _minus_cosine(turn * turn)


@triton.jit
def _minus_cosine(square):
    """Return -cos(2 pi turn) of squares of turns up to 1/2, within 5e-7: a polynomial, since cos handles any angle."""
    high = 85.450165 + square * (-60.1678273 + square * (25.9682975 - square * 6.52958926))
    return -0.999999989 + square * (19.7392045 + square * (-64.939119 + square * high))


@triton.jit
def _transform(
    images, out, mean, std, keep, mix_boxes, erase_index, erase_boxes, keys, height, group,
    WIDTH: tl.constexpr, MIXES: tl.constexpr, ERASES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0)
    values = 3 * height * WIDTH
    offset = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = offset < values
    colour, pixel = offset % 3, offset // 3
    y, x = pixel // WIDTH, pixel % WIDTH
    centre, deviation = _of_colour(mean, colour), _of_colour(std, colour)
    own = image.to(tl.int64) * values + offset
    result = tl.load(images + own, exists, 0).to(tl.float32) - centre
    if MIXES:
        number = image // group
        partner = number * group + group - 1 - image % group
        other = tl.load(images + partner.to(tl.int64) * values + offset, exists, 0).to(tl.float32)
        share = tl.where(_inside(mix_boxes, number, y, x), 0.0, tl.load(keep + number))
        result = result * share + (other - centre) * (1 - share)
    result = result / deviation
    if ERASES:
        index = tl.load(erase_index + image)
        if index >= 0:
            noise = _normal(tl.load(keys + index), colour * height * WIDTH + pixel)
            result = tl.where(_inside(erase_boxes, index, y, x), noise, result)
    tl.store(out + own, result, exists)


def transform(
    images: Tensor, mean: Tensor, std: Tensor, mixing: tuple[Tensor, Tensor] | None, erasing: tuple[Tensor, ...] | None
) -> Tensor:
    """Transform the images to the network's input.

    Args:
        images: uint8 [B, 3, H, W], channels_last.
        mean, std: float32, three values each, in units of [0, 255].
        mixing: weight of the own pixels outside each group's box, float32 [G], and the boxes, int64 [G, 4].
        erasing: for each image its index in the next two or -1, int64 [B]; boxes, int64 [K, 4]; keys, int64 [K].

    Returns:
        float32 [B, 3, H, W], channels_last.
    """
    batch, _, height, width = images.shape
    pixels = images.permute(0, 2, 3, 1).contiguous()
    out = torch.empty_like(pixels, dtype=torch.float32)
    keep, mix_boxes = mixing or (mean, mean)
    erase_index, erase_boxes, keys = erasing or (mean, mean, mean)
    launch: Any = _transform[batch, triton.cdiv(3 * height * width, BLOCK)]
    launch(
        pixels, out, mean, std, keep, mix_boxes, erase_index, erase_boxes, keys, height,
        batch // len(keep) if mixing else 1,
        WIDTH=width, MIXES=mixing is not None, ERASES=erasing is not None, BLOCK=BLOCK,
    )  # fmt: skip
    return out.permute(0, 3, 1, 2)

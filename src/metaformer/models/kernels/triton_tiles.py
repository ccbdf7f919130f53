"""Tiling of images into Triton programs, and functions that all tiled kernels share.

A tile is BLOCK_P positions (row by row of one image) by BLOCK_C channels, so that neighbouring threads read adjacent
channels. Sums over an image take two steps: each tile writes its own sum, and another pass adds them in a fixed order.
No atomic operations are used, so the same input gives the same bits.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

cdiv, next_power_of_2 = cache(triton.cdiv), cache(triton.next_power_of_2)  # a step calls them often


class Tiling(NamedTuple):
    """The tiles of a [B, H, W, C] tensor.

    Attributes:
        grid: the number of channel tiles, which change fastest, of position tiles, and of images.
        sizes: the numbers of positions and of channels.
        blocks: the tile size as kernel arguments, with 16 elements per thread.
    """

    grid: tuple[int, int, int]
    sizes: tuple[int, int]
    blocks: dict[str, int]

    def new_sums(self, like: Tensor, *shape: int) -> Tensor:
        """Allocate a float32 tensor [images, position tiles, *shape]."""
        return like.new_empty((self.grid[2], self.grid[1], *shape), dtype=torch.float32)

    def new_moments(self, like: Tensor) -> Tensor:
        """Allocate the output of `store_moments`, float32 [images, tiles, 3]."""
        return like.new_empty((self.grid[2], self.grid[1] * self.grid[0], 3), dtype=torch.float32)


@cache
def tiling(images: int, height: int, width: int, channels: int) -> Tiling:
    """Return tiles of at most 4096 elements; all widths of the paper's networks are multiples of 32."""
    positions = height * width
    block_p = min(128, next_power_of_2(positions))
    block_c = min(4096 // block_p, 64 if block_p < 128 else 32, next_power_of_2(channels))
    return Tiling(
        (cdiv(channels, block_c), cdiv(positions, block_p), images),
        (positions, channels),
        {"BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": max(1, block_p * block_c // 512)},
    )


@triton.jit
def tile_offsets(positions, channels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """This program's image, positions [P, 1] and channels [1, C], their memory offsets, and the mask of valid ones."""
    image = tl.program_id(2)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    offsets = image.to(tl.int64) * positions * channels + p * channels + c
    return image, p, c, offsets, (p < positions) & (c < channels)


@triton.jit
def tile_number():
    """This program's position in a tensor of values of all images and position tiles, int64."""
    return tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)


@triton.jit
def store_moments(values, mask, positions, channels, moments):
    """Store the number of values in a tile, their mean, and the sum of squared deviations from it."""
    rows = tl.minimum(positions - tl.program_id(1) * values.shape[0], values.shape[0])
    columns = tl.minimum(channels - tl.program_id(0) * values.shape[1], values.shape[1])
    count = (rows * columns).to(tl.float32)
    mean = tl.sum(tl.where(mask, values, 0.0)) / count
    deviation = tl.where(mask, values - mean, 0.0)
    pointer = moments + 3 * (tile_number() * tl.num_programs(0) + tl.program_id(0))
    tl.store(pointer, count)
    tl.store(pointer + 1, mean)
    tl.store(pointer + 2, tl.sum(deviation * deviation))


@triton.jit
def _combine_moments(moments, stats, tiles, eps, BLOCK: tl.constexpr):
    """Combine an image's tiles by Chan's formula, BLOCK at a time: first the mean, then the deviations from it."""
    image = tl.program_id(0)
    first = moments + image.to(tl.int64) * tiles * 3
    counts = tl.zeros([BLOCK], tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, tiles, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        count = tl.load(first + 3 * tile, tile < tiles, 0.0)
        counts += count
        sums += count * tl.load(first + 3 * tile + 1, tile < tiles, 0.0)
    total = tl.sum(counts)
    mean = tl.sum(sums) / total
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, tiles, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        count = tl.load(first + 3 * tile, tile < tiles, 0.0)
        deviation = tl.load(first + 3 * tile + 1, tile < tiles, 0.0) - mean
        squares += count * deviation * deviation + tl.load(first + 3 * tile + 2, tile < tiles, 0.0)
    tl.store(stats + 2 * image, mean)
    tl.store(stats + 2 * image + 1, 1 / tl.sqrt(tl.sum(squares) / total + eps))


def combine_moments(moments: Tensor, eps: float) -> Tensor:
    """Combine the moments of all tiles into the statistics of each image, float32 [B, 2]."""
    images, tiles, _ = moments.shape
    stats = moments.new_empty((images, 2))
    _combine_moments[(images,)](moments, stats, tiles, eps, BLOCK=min(1024, next_power_of_2(tiles)))
    return stats

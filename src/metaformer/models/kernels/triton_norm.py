"""Triton kernels of image statistics, the norm and its gradient.

Bytes moved per element of x, where e is its size and h that of the norm's output: `statistics` e, `normalize` e + h,
`normalize_backward` (e + h) + (3 e + h) in two passes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from metaformer.models.kernels.triton_tiles import (
    combine_moments,
    next_power_of_2,
    store_moments,
    tile_number,
    tile_offsets,
    tiling,
)


@triton.jit
def _statistics(x, moments, positions, channels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    image, p, c, offsets, mask = tile_offsets(positions, channels, BLOCK_P, BLOCK_C)
    store_moments(tl.load(x + offsets, mask, 0.0).to(tl.float32), mask, moments)


@triton.jit
def _normalize(x, stats, weight, bias, out, positions, channels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    image, p, c, offsets, mask = tile_offsets(positions, channels, BLOCK_P, BLOCK_C)
    mean, rstd = tl.load(stats + 2 * image), tl.load(stats + 2 * image + 1)
    factor = tl.load(weight + c, c < channels, 0.0) * rstd
    values = tl.load(x + offsets, mask, 0.0).to(tl.float32)
    tl.store(out + offsets, (values - mean) * factor + tl.load(bias + c, c < channels, 0.0), mask)


@triton.jit
def _sum_gradient(grad, x, stats, sums, positions, channels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    image, p, c, offsets, mask = tile_offsets(positions, channels, BLOCK_P, BLOCK_C)
    mean, rstd = tl.load(stats + 2 * image), tl.load(stats + 2 * image + 1)
    grad_out = tl.load(grad + offsets, mask, 0.0).to(tl.float32)
    normed = (tl.load(x + offsets, mask, 0.0).to(tl.float32) - mean) * rstd
    pointer = sums + tile_number() * 2 * channels + c
    tl.store(pointer, tl.sum(grad_out, 0)[None, :], c < channels)
    tl.store(pointer + channels, tl.sum(grad_out * normed, 0)[None, :], c < channels)


@triton.jit
def _finish_sums(sums, stats, weight, totals, factors, size, channels, tiles, BLOCK_C: tl.constexpr):
    """Sum an image's tiles. Write its part of the gradients of bias and weight, and the factors of its gradient."""
    image, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_C)
    grad_sums = tl.zeros([BLOCK_C], tl.float32)
    products = tl.zeros([BLOCK_C], tl.float32)
    for tile in range(tiles):
        pointer = sums + (image * tiles + tile) * 2 * channels + c
        grad_sums += tl.load(pointer, c < channels, 0.0)
        products += tl.load(pointer + channels, c < channels, 0.0)
    tl.store(totals + image * channels + c, grad_sums, c < channels)
    tl.store(totals + (tl.num_programs(0) + image) * channels + c, products, c < channels)
    mean, rstd = tl.load(stats + 2 * image), tl.load(stats + 2 * image + 1)
    weights = tl.load(weight + c, c < channels, 0.0)
    shift, slope = tl.sum(grad_sums * weights) / size, tl.sum(products * weights) / size * rstd * rstd
    tl.store(factors + 3 * image, rstd)
    tl.store(factors + 3 * image + 1, -slope)
    tl.store(factors + 3 * image + 2, slope * mean - shift * rstd)


@triton.jit
def _apply_gradient(
    grad, x, residual_grad, factors, weight, out, positions, channels,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    image, p, c, offsets, mask = tile_offsets(positions, channels, BLOCK_P, BLOCK_C)
    rstd, slope, constant = (
        tl.load(factors + 3 * image),
        tl.load(factors + 3 * image + 1),
        tl.load(factors + 3 * image + 2),
    )
    scaled = tl.load(grad + offsets, mask, 0.0).to(tl.float32) * (tl.load(weight + c, c < channels, 0.0) * rstd)
    values = tl.load(x + offsets, mask, 0.0).to(tl.float32)
    residual = tl.load(residual_grad + offsets, mask, 0.0).to(tl.float32)
    tl.store(out + offsets, scaled + slope * values + constant + residual, mask)


def statistics(x: Tensor, eps: float) -> Tensor:
    """Return mean and 1 / sqrt(variance + eps) of each image over all its values, [B, 2]."""
    tiles = tiling(*x.shape)
    moments = tiles.new_moments(x)
    _statistics[tiles.grid](x, moments, *tiles.sizes, **tiles.blocks)
    return combine_moments(moments, eps)


def normalize(x: Tensor, stats: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (x - mean) * rstd * weight + bias, in `dtype`."""
    tiles = tiling(*x.shape)
    out = torch.empty_like(x, dtype=dtype)
    _normalize[tiles.grid](x, stats, weight, bias, out, *tiles.sizes, **tiles.blocks)
    return out


def normalize_backward(
    grad: Tensor, x: Tensor, stats: Tensor, weight: Tensor, residual_grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `normalize` for x, weight and bias; `residual_grad` is added to that for x."""
    images, channels, tiles = len(x), x.shape[3], tiling(*x.shape)
    sums = tiles.new_sums(x, 2, channels)
    _sum_gradient[tiles.grid](grad, x, stats, sums, *tiles.sizes, **tiles.blocks)
    totals, factors = sums.new_empty((2, images, channels)), sums.new_empty((images, 3))
    _finish_sums[(images,)](
        sums, stats, weight, totals, factors, tiles.sizes[0] * channels, channels, tiles.grid[1],
        BLOCK_C=next_power_of_2(channels),
    )  # fmt: skip
    out = torch.empty_like(x)
    _apply_gradient[tiles.grid](grad, x, residual_grad, factors, weight, out, *tiles.sizes, **tiles.blocks)
    # Two sums: halves of one tensor would share memory, which torch does not allow for an operator's results.
    return out, totals[1].sum(0), totals[0].sum(0)

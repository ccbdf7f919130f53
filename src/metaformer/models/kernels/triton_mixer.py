"""Triton kernels of the token mixer branch and its gradient; see `reference` for their definitions.

Bytes moved per element of x, where e is its size: `mix` 2 e, `mix_backward` 2 e + 3 e in two passes. The other elements
of a window are read by the same or a neighbouring program at nearly the same time, so they come from a cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from metaformer.models.kernels.triton_tiles import (
    combine_moments,
    new_moments,
    store_moments,
    tile_offsets,
    tiling,
)


@triton.jit
def _window_side(center, side, RADIUS: tl.constexpr):
    """The number of rows (or columns) of the window around `center` that are in the image."""
    return tl.minimum(center + RADIUS, side - 1) - tl.maximum(center - RADIUS, 0) + 1


@triton.jit
def _sum_window(x, p, c, offsets, height, width, channels, RADIUS: tl.constexpr, TRANSPOSED: tl.constexpr):
    """The sum over each position's window; if TRANSPOSED, of each value divided by the area of its own window."""
    row, column = p // width, p % width
    total = tl.zeros(offsets.shape, tl.float32)
    for dy in tl.static_range(-RADIUS, RADIUS + 1):
        for dx in tl.static_range(-RADIUS, RADIUS + 1):
            near_row, near_column = row + dy, column + dx
            inside = (near_row >= 0) & (near_row < height) & (near_column >= 0) & (near_column < width) & (c < channels)
            value = tl.load(x + offsets + (dy * width + dx) * channels, inside, 0.0).to(tl.float32)
            if TRANSPOSED:
                area = _window_side(near_row, height, RADIUS) * _window_side(near_column, width, RADIUS)
                area = tl.maximum(area, 1)  # it may be 0 outside the image
                value = value / area.to(tl.float32)
            total += tl.where(inside, value, 0.0)
    return total


@triton.jit
def _mix(
    x, factor, out, moments, height, width, channels, tiles,
    RADIUS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    image, p, c, offsets, mask = tile_offsets(height * width, channels, tiles, BLOCK_P, BLOCK_C)
    total = _sum_window(x, p, c, offsets, height, width, channels, RADIUS, False)
    area = tl.maximum(_window_side(p // width, height, RADIUS) * _window_side(p % width, width, RADIUS), 1)
    values = tl.load(x + offsets, mask, 0.0).to(tl.float32)
    scale = tl.load(factor + image * channels + c, c < channels, 0.0)
    mixed = (values + scale * (total / area.to(tl.float32) - values)).to(out.dtype.element_ty)
    tl.store(out + offsets, mixed, mask)
    store_moments(mixed.to(tl.float32), mask, moments)


@triton.jit
def _sum_products(
    grad, x, sums, height, width, channels, tiles,
    RADIUS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    image, p, c, offsets, mask = tile_offsets(height * width, channels, tiles, BLOCK_P, BLOCK_C)
    difference = _sum_window(grad, p, c, offsets, height, width, channels, RADIUS, True)
    difference -= tl.load(grad + offsets, mask, 0.0).to(tl.float32)
    products = tl.where(mask, difference * tl.load(x + offsets, mask, 0.0).to(tl.float32), 0.0)
    tl.store(sums + tl.program_id(0).to(tl.int64) * channels + c, tl.sum(products, 0)[None, :], c < channels)


@triton.jit
def _apply_gradient(
    grad, x, factor, slopes, means, out, height, width, channels, tiles,
    RADIUS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    image, p, c, offsets, mask = tile_offsets(height * width, channels, tiles, BLOCK_P, BLOCK_C)
    pooled = _sum_window(grad, p, c, offsets, height, width, channels, RADIUS, True)
    grad_out = tl.load(grad + offsets, mask, 0.0).to(tl.float32)
    scale = tl.load(factor + image * channels + c, c < channels, 0.0)
    centred = tl.load(x + offsets, mask, 0.0).to(tl.float32) - tl.load(means + 2 * image)
    tl.store(out + offsets, grad_out + scale * (pooled - grad_out) + tl.load(slopes + image) * centred, mask)


def mix(x: Tensor, stats: Tensor, scale: Tensor, keep: Tensor | None, size: int, eps: float) -> tuple[Tensor, Tensor]:
    """Compute `reference._mix`."""
    tiles = tiling(x)
    out, moments = torch.empty_like(x), new_moments(x, tiles)
    _mix[tiles.grid](
        x, _branch_factor(stats, scale, keep), out, moments, *x.shape[1:], tiles.position_tiles,
        RADIUS=size // 2, **tiles.blocks,
    )  # fmt: skip
    return out, combine_moments(moments, eps)


def mix_backward(
    grad: Tensor, x: Tensor, stats: Tensor, scale: Tensor, keep: Tensor | None, size: int
) -> tuple[Tensor, Tensor]:
    """Compute `reference.mix_backward`."""
    tiles = tiling(x)
    sums = stats.new_empty((tiles.images, tiles.position_tiles, x.shape[3]))
    sizes = (*x.shape[1:], tiles.position_tiles)
    _sum_products[tiles.grid](grad, x, sums, *sizes, RADIUS=size // 2, **tiles.blocks)
    products = sums.sum(1)
    if keep is not None:
        products = products * keep[:, None]
    rstd = stats[:, 1]
    slopes = (products @ scale) * rstd**3 / -x[0].numel()
    out = torch.empty_like(x)
    _apply_gradient[tiles.grid](
        grad, x, _branch_factor(stats, scale, keep), slopes, stats, out, *sizes, RADIUS=size // 2, **tiles.blocks
    )
    return out, rstd @ products


def _branch_factor(stats: Tensor, scale: Tensor, keep: Tensor | None) -> Tensor:
    """Return the factor of pool(x) - x, [B, C]."""
    factor = stats[:, 1:] * scale
    return factor if keep is None else factor * keep[:, None]

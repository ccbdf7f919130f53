"""Triton kernels of image statistics, the norm and its gradient; see `reference` for their definitions.

Bytes moved per element of x, where e is its size and h that of the norm's output: `statistics` e, `normalize` e + h,
`normalize_backward` (e + h) + (3 e + h) in two passes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from metaformer.models.kernels.triton_tiles import (
    combine_moments,
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
    """Compute `reference._statistics`."""
    tiles = tiling(*x.shape)
    moments = tiles.new_moments(x)
    _statistics[tiles.grid](x, moments, *tiles.sizes, **tiles.blocks)
    return combine_moments(moments, eps)


def normalize(x: Tensor, stats: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute `reference.normalize`."""
    tiles = tiling(*x.shape)
    out = torch.empty_like(x, dtype=dtype)
    _normalize[tiles.grid](x, stats, weight, bias, out, *tiles.sizes, **tiles.blocks)
    return out


def normalize_backward(
    grad: Tensor, x: Tensor, stats: Tensor, weight: Tensor, residual_grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `reference.normalize_backward`."""
    tiles = tiling(*x.shape)
    sums = tiles.new_sums(x, 2, x.shape[3])
    _sum_gradient[tiles.grid](grad, x, stats, sums, *tiles.sizes, **tiles.blocks)
    per_image = sums.sum(1)  # [B, 2, C]
    mean, rstd = stats.unbind(1)
    shift, slope = (per_image @ weight).div_(x[0].numel()).unbind(1)
    slope = slope * rstd**2
    factors = torch.stack([rstd, -slope, slope * mean - shift * rstd], 1)
    out = torch.empty_like(x)
    _apply_gradient[tiles.grid](
        grad, x, residual_grad, factors, weight, out, *tiles.sizes, **tiles.blocks
    )  # fmt: skip
    # Two sums: halves of one tensor would share memory, which torch does not allow for an operator's results.
    return out, per_image[:, 1].sum(0), per_image[:, 0].sum(0)

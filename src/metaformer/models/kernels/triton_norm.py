"""Triton kernels of image statistics and the norm.

Bytes moved per element of x, where e is its size and h that of the norm's output: `statistics` e, `normalize` e + h.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from metaformer.models.kernels.triton_tiles import combine_moments, store_moments, tile_offsets, tiling


@triton.jit
def _statistics(x, moments, positions, channels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    image, p, c, offsets, mask = tile_offsets(positions, channels, BLOCK_P, BLOCK_C)
    store_moments(tl.load(x + offsets, mask, 0.0).to(tl.float32), mask, positions, channels, moments)


@triton.jit
def _normalize(x, stats, out, positions, channels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    image, p, c, offsets, mask = tile_offsets(positions, channels, BLOCK_P, BLOCK_C)
    values = tl.load(x + offsets, mask, 0.0).to(tl.float32)
    tl.store(out + offsets, (values - tl.load(stats + 2 * image)) * tl.load(stats + 2 * image + 1), mask)


def statistics(x: Tensor, eps: float) -> Tensor:
    """Return mean and 1 / sqrt(variance + eps) of each image over all its values, [B, 2]."""
    tiles = tiling(*x.shape)
    moments = tiles.new_moments(x)
    _statistics[tiles.grid](x, moments, *tiles.sizes, **tiles.blocks)
    return combine_moments(moments, eps)


def normalize(x: Tensor, stats: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (x - mean) * rstd in `dtype`."""
    tiles = tiling(*x.shape)
    out = torch.empty_like(x, dtype=dtype)
    _normalize[tiles.grid](x, stats, out, *tiles.sizes, **tiles.blocks)
    return out

"""Triton kernels of blocks without pooling: norms over channels, the norm alone as a branch, and their gradients.

Bytes moved per element of x, where e is its size and h that of the norm's output: `normalize_channels` e + h,
`norm_backward` 2 e + 2 h, `add_norm` 2 e, `add_norm_backward` 2 e + 3 e in two passes.

A tile of a norm over channels is BLOCK_R rows of a [rows, channels] matrix with all their channels.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from metaformer.models.kernels.triton_tiles import (
    cdiv,
    combine_moments,
    next_power_of_2,
    store_moments,
    tile_number,
    tile_offsets,
    tiling,
)

TILES_PER_PROGRAM = 16  # whose sums over rows one program adds


@cache
def _row_blocks(channels: int) -> dict[str, int]:
    """Return the size of a tile of rows as kernel arguments, with 8 elements per thread."""
    block_c = next_power_of_2(channels)
    block_r = max(1, 2048 // block_c)
    return {"BLOCK_R": block_r, "BLOCK_C": block_c, "num_warps": max(1, block_r * block_c // 256)}


@triton.jit
def _rows(tile, rows, channels, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """The rows [R, 1] and channels [1, C] of a tile, their memory offsets, and the mask of valid ones."""
    row, c = tile * BLOCK_R + tl.arange(0, BLOCK_R)[:, None], tl.arange(0, BLOCK_C)[None, :]
    return row, c, row.to(tl.int64) * channels + c, (row < rows) & (c < channels)


@triton.jit
def _normalize_channels(x, out, stats, rows, channels, eps, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    row, c, offsets, mask = _rows(tl.program_id(0), rows, channels, BLOCK_R, BLOCK_C)
    values = tl.load(x + offsets, mask, 0.0).to(tl.float32)
    mean = (tl.sum(values, 1) / channels)[:, None]
    deviation = tl.where(mask, values - mean, 0.0)
    rstd = (1 / tl.sqrt(tl.sum(deviation * deviation, 1) / channels + eps))[:, None]
    tl.store(out + offsets, deviation * rstd, mask)
    tl.store(stats + 2 * row, mean, row < rows)
    tl.store(stats + 2 * row + 1, rstd, row < rows)


@triton.jit
def _channel_norm_backward(
    grad, normed, stats, residual_grad, residual_scale, out, sums, rows, channels,
    SCALED: tl.constexpr, LOOPS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    products = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for loop in range(LOOPS):
        row, c, offsets, mask = _rows(tl.program_id(0) * LOOPS + loop, rows, channels, BLOCK_R, BLOCK_C)
        mean, rstd = tl.load(stats + 2 * row, row < rows, 0.0), tl.load(stats + 2 * row + 1, row < rows, 1.0)
        values = tl.load(normed + offsets, mask, 0.0).to(tl.float32)
        grad_out = tl.load(grad + offsets, mask, 0.0).to(tl.float32)
        residual = tl.load(residual_grad + offsets, mask, 0.0).to(tl.float32)
        shift = (tl.sum(grad_out, 1) / channels)[:, None]
        slope = (tl.sum(grad_out * values, 1) / channels)[:, None]
        if SCALED:
            products += residual * (values * (1 / rstd) + mean)
            residual = residual * tl.load(residual_scale + c, c < channels, 0.0)
        tl.store(out + offsets, (grad_out - shift - values * slope) * rstd + residual, mask)
    if SCALED:
        c = tl.arange(0, BLOCK_C)[None, :]
        pointer = sums + tl.program_id(0).to(tl.int64) * channels + c
        tl.store(pointer, tl.sum(products, 0)[None, :], c < channels)


@triton.jit
def _image_norm_backward(
    grad, normed, stats, norm_sums, residual_grad, residual_scale, out, sums, parts, positions, channels,
    SCALED: tl.constexpr, PARTS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    image, p, c, offsets, mask = tile_offsets(positions, channels, BLOCK_P, BLOCK_C)
    part, pointer = tl.arange(0, PARTS), norm_sums + image.to(tl.int64) * parts * 2
    shift = tl.sum(tl.load(pointer + 2 * part, part < parts, 0.0)) / (positions * channels)
    slope = tl.sum(tl.load(pointer + 2 * part + 1, part < parts, 0.0)) / (positions * channels)
    mean, rstd = tl.load(stats + 2 * image), tl.load(stats + 2 * image + 1)
    values = tl.load(normed + offsets, mask, 0.0).to(tl.float32)
    grad_out = tl.load(grad + offsets, mask, 0.0).to(tl.float32)
    residual = tl.load(residual_grad + offsets, mask, 0.0).to(tl.float32)
    if SCALED:
        product = residual * (values * (1 / rstd) + mean)
        tl.store(sums + tile_number() * channels + c, tl.sum(product, 0)[None, :], c < channels)
        residual = residual * tl.load(residual_scale + c, c < channels, 0.0)
    tl.store(out + offsets, (grad_out - shift - values * slope) * rstd + residual, mask)


@triton.jit
def _add_norm(
    x, stats, weight, bias, keep, residual_scale, out, moments, positions, channels,
    HAS_KEEP: tl.constexpr, SCALED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    image, p, c, offsets, mask = tile_offsets(positions, channels, BLOCK_P, BLOCK_C)
    mean, rstd = tl.load(stats + 2 * image), tl.load(stats + 2 * image + 1)
    factor, shift = tl.load(weight + c, c < channels, 0.0) * rstd, tl.load(bias + c, c < channels, 0.0).to(tl.float32)
    if HAS_KEEP:
        kept = tl.load(keep + image)
        factor, shift = factor * kept, shift * kept
    values = tl.load(x + offsets, mask, 0.0).to(tl.float32)
    identity = values
    if SCALED:
        identity = values * tl.load(residual_scale + c, c < channels, 0.0)
    result = (identity + (values - mean) * factor + shift).to(out.dtype.element_ty)
    tl.store(out + offsets, result, mask)
    store_moments(result.to(tl.float32), mask, positions, channels, moments)


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
def _finish_sums(
    sums, stats, weight, keep, totals, factors, size, channels, tiles,
    HAS_KEEP: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sum an image's tiles. Write its part of the parameters' gradients, and the factors of its gradient."""
    image, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_C)
    grad_sums = tl.zeros([BLOCK_C], tl.float32)
    products = tl.zeros([BLOCK_C], tl.float32)
    for tile in range(tiles):
        pointer = sums + (image * tiles + tile) * 2 * channels + c
        grad_sums += tl.load(pointer, c < channels, 0.0)
        products += tl.load(pointer + channels, c < channels, 0.0)
    mean, rstd = tl.load(stats + 2 * image), tl.load(stats + 2 * image + 1)
    kept = tl.load(keep + image) if HAS_KEEP else 1.0
    total = totals + image * channels + c
    tl.store(total, products * kept, c < channels)
    tl.store(total + tl.num_programs(0) * channels, grad_sums * kept, c < channels)
    tl.store(total + 2 * tl.num_programs(0) * channels, products / rstd + mean * grad_sums, c < channels)
    weights = tl.load(weight + c, c < channels, 0.0) * kept
    shift, slope = tl.sum(grad_sums * weights) / size, tl.sum(products * weights) / size * rstd * rstd
    tl.store(factors + 3 * image, rstd * kept)
    tl.store(factors + 3 * image + 1, -slope)
    tl.store(factors + 3 * image + 2, slope * mean - shift * rstd)


@triton.jit
def _apply_gradient(
    grad, x, factors, weight, residual_scale, out, positions, channels,
    SCALED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    image, p, c, offsets, mask = tile_offsets(positions, channels, BLOCK_P, BLOCK_C)
    slope, constant = tl.load(factors + 3 * image + 1), tl.load(factors + 3 * image + 2)
    factor = tl.load(weight + c, c < channels, 0.0) * tl.load(factors + 3 * image)
    factor += tl.load(residual_scale + c, c < channels, 0.0) if SCALED else 1.0
    values = tl.load(x + offsets, mask, 0.0).to(tl.float32)
    tl.store(
        out + offsets, tl.load(grad + offsets, mask, 0.0).to(tl.float32) * factor + slope * values + constant, mask
    )


def normalize_channels(x: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return (x - mean) * rstd in `dtype` with the statistics of each position's channels, and these, [B, H, W, 2]."""
    channels, out = x.shape[3], torch.empty_like(x, dtype=dtype)
    rows, blocks = x.numel() // channels, _row_blocks(channels)
    stats = x.new_empty((*x.shape[:3], 2), dtype=torch.float32)
    _normalize_channels[(cdiv(rows, blocks["BLOCK_R"]),)](x, out, stats, rows, channels, eps, **blocks)
    return out, stats


def norm_backward(
    grad: Tensor, normed: Tensor, stats: Tensor, sums: Tensor, residual_grad: Tensor, residual_scale: Tensor | None
) -> tuple[Tensor, ...]:
    """Return the gradient of a norm's input, and that of the residual scale if there is one.

    Args:
        grad, normed: gradient of the normalised pixels, and these.
        stats: statistics of each image, [B, 2], or of each position, [B, H, W, 2].
        sums: parts of each image's sums of `grad` and of `grad` times `normed`, [B, parts, 2]; not for positions.
        residual_grad: gradient of the block's output; times the residual scale, it is added to the gradient.
        residual_scale: factor of the input in the block's sum, [C], or None.
    """
    images, height, width, channels = normed.shape
    out, scaled, arguments = torch.empty_like(residual_grad), residual_scale is not None, (grad, normed, stats)
    scale = stats if residual_scale is None else residual_scale
    if stats.ndim == 2:
        tiles = tiling(*normed.shape)
        products = tiles.new_sums(out, channels) if scaled else stats
        _image_norm_backward[tiles.grid](
            *arguments, sums, residual_grad, scale, out, products, sums.shape[1], *tiles.sizes,
            SCALED=scaled, PARTS=next_power_of_2(sums.shape[1]), **tiles.blocks,
        )  # fmt: skip
    else:
        rows, blocks = images * height * width, _row_blocks(channels)
        loops = TILES_PER_PROGRAM if scaled else 1
        programs = cdiv(rows, blocks["BLOCK_R"] * loops)
        products = stats.new_empty((programs, 1, channels)) if scaled else stats
        _channel_norm_backward[(programs,)](
            *arguments, residual_grad, scale, out, products, rows, channels, SCALED=scaled, LOOPS=loops, **blocks
        )
    return (out, products.sum((0, 1))) if scaled else (out,)


def add_norm(
    x: Tensor, stats: Tensor, weight: Tensor, bias: Tensor, keep: Tensor | None, residual_scale: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return y = residual_scale * x + keep * (weight * (x - mean) * rstd + bias), and the statistics of y."""
    tiles = tiling(*x.shape)
    out, moments = torch.empty_like(x), tiles.new_moments(x)
    _add_norm[tiles.grid](
        x, stats, weight, bias, weight if keep is None else keep, weight if residual_scale is None else residual_scale,
        out, moments, *tiles.sizes, HAS_KEEP=keep is not None, SCALED=residual_scale is not None, **tiles.blocks,
    )  # fmt: skip
    return out, combine_moments(moments, eps)


def add_norm_backward(
    grad: Tensor, x: Tensor, stats: Tensor, weight: Tensor, keep: Tensor | None, residual_scale: Tensor | None
) -> tuple[Tensor, ...]:
    """Return the gradients of `add_norm` for x, weight, bias, and residual_scale if there is one."""
    images, channels, tiles = len(x), x.shape[3], tiling(*x.shape)
    sums = tiles.new_sums(x, 2, channels)
    _sum_gradient[tiles.grid](grad, x, stats, sums, *tiles.sizes, **tiles.blocks)
    totals, factors = sums.new_empty((3, images, channels)), sums.new_empty((images, 3))
    _finish_sums[(images,)](
        sums, stats, weight, weight if keep is None else keep, totals, factors, tiles.sizes[0] * channels, channels,
        tiles.grid[1], HAS_KEEP=keep is not None, BLOCK_C=next_power_of_2(channels),
    )  # fmt: skip
    out = torch.empty_like(x)
    _apply_gradient[tiles.grid](
        grad, x, factors, weight, weight if residual_scale is None else residual_scale, out, *tiles.sizes,
        SCALED=residual_scale is not None, **tiles.blocks,
    )  # fmt: skip
    # A sum for each: parts of one tensor would share memory, which torch does not allow for an operator's results.
    return out, *(each.sum(0) for each in totals[: 2 if residual_scale is None else 3])

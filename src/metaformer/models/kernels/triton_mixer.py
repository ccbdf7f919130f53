"""Triton kernels of the token mixer branch and its gradient.

Bytes moved per element of x, where e is its size: `mix` 2 e, `mix_backward` 2 e + 3 e in two passes. Neighbours in a
row are read again by the same or a neighbouring program at nearly the same time, so they come from a cache.

A window's average is separable. With n(i) the number of rows (or columns) of the window around i that are in the image,

    (A x)(i, j) = 1 / n(i) * sum over k of h(i + k, j)      h(i, j) = 1 / n(j) * sum over k of x(i, j + k)
    (A^T e)(i, j) = sum over k of t(i + k, j)               t(i, j) = 1 / n(i) * sum over k of e(i, j + k) / n(j + k)

where k runs from -R to R.

A program walks down a strip of LOOPS rows. It keeps the sums of the last 2 R rows in registers, so it loads 2 R + 1
values for each element, not (2 R + 1)^2. A missing row or column counts as zeros.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from metaformer.models.kernels.triton_tiles import combine_moments, next_power_of_2

MAX_ROWS = 16  # of a strip


class Strips(NamedTuple):
    """The strips of an image of a [B, H, W, C] tensor.

    Attributes:
        tiles: the number of channel tiles, and of strips.
        blocks: their size as kernel arguments.
    """

    tiles: tuple[int, int]
    blocks: dict[str, int]


@cache
def strips(height: int, width: int, channels: int, size: int) -> Strips:
    """Return strips of at most MAX_ROWS rows of 16 columns; all widths of the paper's networks are multiples of 32."""
    block_w = min(16, triton.next_power_of_2(width))
    block_c = min(32 if channels % 64 else 64, triton.next_power_of_2(channels))
    rows = triton.cdiv(height, triton.cdiv(height, MAX_ROWS))
    return Strips(
        (triton.cdiv(channels, block_c), triton.cdiv(height, rows) * triton.cdiv(width, block_w)),
        {
            "RADIUS": size // 2,
            "LOOPS": rows,
            "BLOCK_W": block_w,
            "BLOCK_C": block_c,
            "num_warps": max(
                1, block_w * block_c // 256
            ),  # 8 values of a row a thread, so that 9 rows fit in registers
        },
    )


@triton.jit
def _strip(width, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, LOOPS: tl.constexpr):
    """This program's image, first row, columns [W, 1] and channels [1, C]."""
    column_tiles = (width + BLOCK_W - 1) // BLOCK_W
    row = (tl.program_id(1) // column_tiles) * LOOPS
    column = (tl.program_id(1) % column_tiles) * BLOCK_W + tl.arange(0, BLOCK_W)[:, None]
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    return tl.program_id(2), row, column, c


@triton.jit
def _share(center, side, RADIUS: tl.constexpr):
    """1 / n: the weight of each row (or column) in the average over the window around `center`."""
    inside = tl.minimum(center + RADIUS, side - 1) - tl.maximum(center - RADIUS, 0) + 1
    return 1.0 / tl.maximum(inside, 1).to(tl.float32)  # it may be 0 outside the image


@triton.jit
def _sum_row(
    pixels, row, column, c, height, width, channels, column_share, RADIUS: tl.constexpr, TRANSPOSED: tl.constexpr
):  # fmt: skip
    """h of the module's docstring for a row of `pixels`, [W, C]; t if TRANSPOSED."""
    total = tl.zeros([column.shape[0], c.shape[1]], tl.float32)
    in_row = (row >= 0) & (row < height)
    for dx in tl.static_range(-RADIUS, RADIUS + 1):
        near = column + dx
        mask = in_row & (near >= 0) & (near < width) & (c < channels)
        value = tl.load(pixels + (row * width + near) * channels + c, mask, 0.0).to(tl.float32)
        total += value * _share(near, width, RADIUS) if TRANSPOSED else value
    return total * (_share(row, height, RADIUS) if TRANSPOSED else column_share)


@triton.jit
def _first_rows(
    pixels, row, column, c, height, width, channels, column_share, RADIUS: tl.constexpr, TRANSPOSED: tl.constexpr
):  # fmt: skip
    """The sums of the 2 R rows that the first window has besides its last."""
    rows = ()
    for dy in tl.static_range(-RADIUS, RADIUS):
        near = _sum_row(pixels, row + dy, column, c, height, width, channels, column_share, RADIUS, TRANSPOSED)
        rows = rows + (near,)  # type: ignore[assignment]  # noqa: RUF005 (Triton does not unpack)
    return rows


@triton.jit
def _next_window(
    rows, pixels, row, column, c, height, width, channels, column_share, RADIUS: tl.constexpr, TRANSPOSED: tl.constexpr
):  # fmt: skip
    """Read the last row of the window around `row`: the sums of its last 2 R rows, and the sum over all of them."""
    last = _sum_row(pixels, row + RADIUS, column, c, height, width, channels, column_share, RADIUS, TRANSPOSED)
    total = last
    for k in tl.static_range(2 * RADIUS):
        total += rows[k]
    return rows[1:] + (last,), total  # noqa: RUF005


@triton.jit
def _mix(
    x, stats, scale, keep, out, moments, height, width, channels,
    HAS_KEEP: tl.constexpr, RADIUS: tl.constexpr, LOOPS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    image, first, column, c = _strip(width, BLOCK_W, BLOCK_C, LOOPS)
    start = image.to(tl.int64) * height * width * channels
    pixels, mean = x + start, tl.load(stats + 2 * image)
    factor = tl.load(scale + c, c < channels, 0.0) * tl.load(stats + 2 * image + 1)
    if HAS_KEEP:
        factor = factor * tl.load(keep + image)
    share = _share(column, width, RADIUS)
    rows = _first_rows(pixels, first, column, c, height, width, channels, share, RADIUS, False)
    sums = tl.zeros([BLOCK_W, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_W, BLOCK_C], tl.float32)
    for loop in range(LOOPS):
        row = first + loop
        rows, total = _next_window(rows, pixels, row, column, c, height, width, channels, share, RADIUS, False)
        offsets, mask = (row * width + column) * channels + c, (row < height) & (column < width) & (c < channels)
        values = tl.load(pixels + offsets, mask, 0.0).to(tl.float32)
        mixed = (values + factor * (total * _share(row, height, RADIUS) - values)).to(out.dtype.element_ty)
        tl.store(out + start + offsets, mixed, mask)
        # x and y have nearly the same mean, so the squares around it lose no digits.
        deviation = tl.where(mask, mixed.to(tl.float32) - mean, 0.0)
        sums += deviation
        squares += deviation * deviation
    valid_columns = tl.minimum(width - tl.min(column), BLOCK_W)
    valid_channels = tl.minimum(channels - tl.min(c), BLOCK_C)
    count = (tl.minimum(height - first, LOOPS) * valid_columns * valid_channels).to(tl.float32)
    sum_of_tile = tl.sum(sums)
    tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    pointer = moments + 3 * (image * tl.num_programs(0) * tl.num_programs(1) + tile)
    tl.store(pointer, count)
    tl.store(pointer + 1, mean + sum_of_tile / count)
    tl.store(pointer + 2, tl.maximum(tl.sum(squares) - sum_of_tile * sum_of_tile / count, 0.0))


@triton.jit
def _sum_products(
    grad, x, sums, height, width, channels,
    RADIUS: tl.constexpr, LOOPS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    image, first, column, c = _strip(width, BLOCK_W, BLOCK_C, LOOPS)
    start = image.to(tl.int64) * height * width * channels
    pixels, share = x + start, _share(column, width, RADIUS)
    rows = _first_rows(pixels, first, column, c, height, width, channels, share, RADIUS, False)
    products = tl.zeros([BLOCK_W, BLOCK_C], tl.float32)
    for loop in range(LOOPS):
        row = first + loop
        rows, total = _next_window(rows, pixels, row, column, c, height, width, channels, share, RADIUS, False)
        offsets, mask = (row * width + column) * channels + c, (row < height) & (column < width) & (c < channels)
        difference = total * _share(row, height, RADIUS) - tl.load(pixels + offsets, mask, 0.0).to(tl.float32)
        products += difference * tl.load(grad + start + offsets, mask, 0.0).to(tl.float32)
    tile = image.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(sums + tile * channels + c, tl.sum(products, 0)[None, :], c < channels)


@triton.jit
def _finish_products(
    sums, stats, scale, keep, grad_scale, slopes, size, channels, tiles,
    HAS_KEEP: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sum an image's tiles. Write its gradient of scale, k r S, and the factor of x - m in the gradient of x."""
    image, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_C)
    products = tl.zeros([BLOCK_C], tl.float32)
    for tile in range(tiles):
        products += tl.load(sums + (image * tiles + tile) * channels + c, c < channels, 0.0)
    rstd = tl.load(stats + 2 * image + 1)
    products *= rstd
    if HAS_KEEP:
        products *= tl.load(keep + image)
    tl.store(grad_scale + image * channels + c, products, c < channels)
    slope = tl.sum(products * tl.load(scale + c, c < channels, 0.0)) * rstd * rstd / size
    tl.store(slopes + image, -slope)


@triton.jit
def _apply_gradient(
    grad, x, stats, scale, keep, slopes, out, height, width, channels,
    HAS_KEEP: tl.constexpr, RADIUS: tl.constexpr, LOOPS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    image, first, column, c = _strip(width, BLOCK_W, BLOCK_C, LOOPS)
    start = image.to(tl.int64) * height * width * channels
    pixels, mean, slope = grad + start, tl.load(stats + 2 * image), tl.load(slopes + image)
    factor = tl.load(scale + c, c < channels, 0.0) * tl.load(stats + 2 * image + 1)
    if HAS_KEEP:
        factor = factor * tl.load(keep + image)
    rows = _first_rows(pixels, first, column, c, height, width, channels, 1.0, RADIUS, True)
    for loop in range(LOOPS):
        row = first + loop
        rows, total = _next_window(rows, pixels, row, column, c, height, width, channels, 1.0, RADIUS, True)
        offsets, mask = (row * width + column) * channels + c, (row < height) & (column < width) & (c < channels)
        grad_out = tl.load(pixels + offsets, mask, 0.0).to(tl.float32)
        centred = tl.load(x + start + offsets, mask, 0.0).to(tl.float32) - mean
        tl.store(out + start + offsets, grad_out + factor * (total - grad_out) + slope * centred, mask)


def mix(x: Tensor, stats: Tensor, scale: Tensor, keep: Tensor | None, size: int, eps: float) -> tuple[Tensor, Tensor]:
    """Return y = x + keep * scale * rstd * (pool(x) - x), and the statistics of y."""
    tiles, blocks = strips(*x.shape[1:], size)
    out, moments = torch.empty_like(x), stats.new_empty((len(x), tiles[0] * tiles[1], 3))
    _mix[(*tiles, len(x))](
        x, stats, scale, scale if keep is None else keep, out, moments, *x.shape[1:],
        HAS_KEEP=keep is not None, **blocks,
    )  # fmt: skip
    return out, combine_moments(moments, eps)


def mix_backward(
    grad: Tensor, x: Tensor, stats: Tensor, scale: Tensor, keep: Tensor | None, size: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `mix` for x, including the part through the statistics, and for scale."""
    images, height, width, channels = x.shape
    tiles, blocks = strips(*x.shape[1:], size)
    grid, has_keep, factors = (*tiles, images), keep is not None, (stats, scale, scale if keep is None else keep)
    sums, grad_scale = stats.new_empty((images, tiles[1], channels)), stats.new_empty((images, channels))
    slopes, out = stats.new_empty(images), torch.empty_like(x)
    _sum_products[grid](grad, x, sums, *x.shape[1:], **blocks)
    _finish_products[(images,)](
        sums, *factors, grad_scale, slopes, height * width * channels, channels, tiles[1],
        HAS_KEEP=has_keep, BLOCK_C=next_power_of_2(channels),
    )  # fmt: skip
    _apply_gradient[grid](grad, x, *factors, slopes, out, *x.shape[1:], HAS_KEEP=has_keep, **blocks)
    return out, grad_scale.sum(0)

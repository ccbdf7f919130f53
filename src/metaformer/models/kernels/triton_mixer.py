"""Triton kernels of the token mixer branch and its gradient.

Bytes moved per element of x, where e is the element size of the stream and h that of the matrix products: `mix` 2 e,
`normalize_backward`, which also sums the mixer's products, 3 e + 2 h, and `mix_backward` 3 e. Neighbours in a row are
read again by the same or a neighbouring program at nearly the same time, so they come from a cache.

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
    x, stats, scale, keep, residual_scale, out, moments, height, width, channels,
    HAS_KEEP: tl.constexpr, SCALED: tl.constexpr, RADIUS: tl.constexpr, LOOPS: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
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
        branch = factor * (total * _share(row, height, RADIUS) - values)
        if SCALED:
            values = values * tl.load(residual_scale + c, c < channels, 0.0)
        mixed = (values + branch).to(out.dtype.element_ty)
        tl.store(out + start + offsets, mixed, mask)
        # x and y have nearly the same mean, so the squares around it lose no digits (few with a residual scale).
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
def _normalize_backward(
    grad, normed, stats, norm_sums, residual_grad, residual_scale, x, out, sums, scale_sums, parts, height, width,
    channels, SCALED: tl.constexpr, RADIUS: tl.constexpr, LOOPS: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    image, first, column, c = _strip(width, BLOCK_W, BLOCK_C, LOOPS)
    part, pointer = tl.arange(0, PARTS), norm_sums + image.to(tl.int64) * parts * 2
    count = height * width * channels
    shift = tl.sum(tl.load(pointer + 2 * part, part < parts, 0.0)) / count
    slope = tl.sum(tl.load(pointer + 2 * part + 1, part < parts, 0.0)) / count
    rstd = tl.load(stats + 2 * image + 1)
    start = image.to(tl.int64) * height * width * channels
    pixels, share = x + start, _share(column, width, RADIUS)
    rows = _first_rows(pixels, first, column, c, height, width, channels, share, RADIUS, False)
    products = tl.zeros([BLOCK_W, BLOCK_C], tl.float32)
    scale_products = tl.zeros([BLOCK_W, BLOCK_C], tl.float32)
    for loop in range(LOOPS):
        row = first + loop
        rows, total = _next_window(rows, pixels, row, column, c, height, width, channels, share, RADIUS, False)
        offsets, mask = (row * width + column) * channels + c, (row < height) & (column < width) & (c < channels)
        difference = total * _share(row, height, RADIUS) - tl.load(pixels + offsets, mask, 0.0).to(tl.float32)
        values = tl.load(normed + start + offsets, mask, 0.0).to(tl.float32)
        through_norm = (tl.load(grad + start + offsets, mask, 0.0).to(tl.float32) - shift - values * slope) * rstd
        residual = tl.load(residual_grad + start + offsets, mask, 0.0).to(tl.float32)
        if SCALED:
            scale_products += residual * (values * (1 / rstd) + tl.load(stats + 2 * image))
            residual = residual * tl.load(residual_scale + c, c < channels, 0.0)
        result = (through_norm + residual).to(out.dtype.element_ty)
        tl.store(out + start + offsets, result, mask)
        products += tl.where(mask, difference * result.to(tl.float32), 0.0)
    tile = image.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(sums + tile * channels + c, tl.sum(products, 0)[None, :], c < channels)
    if SCALED:
        tl.store(scale_sums + tile * channels + c, tl.sum(scale_products, 0)[None, :], c < channels)


@triton.jit
def _sum_parts(sums, image, parts, columns, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Sum the rows of an image in [images, parts, columns]."""
    column = tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([PARTS, BLOCK], tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)[:, None]
        total += tl.load(sums + (image * parts + part) * columns + column, (part < parts) & (column < columns), 0.0)
    return tl.sum(total, 0)


@triton.jit
def _finish_sums(
    products, branch_sums, hidden_sums, stats, scale, keep, slopes, out, size, channels,
    product_parts, branch_parts, hidden_parts,
    HAS_KEEP: tl.constexpr, PARTS: tl.constexpr, HIDDEN_PARTS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    image, c, hidden = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_C), tl.arange(0, 4 * BLOCK_C)
    out += image * 6 * channels
    rstd = tl.load(stats + 2 * image + 1)
    grad_scale = _sum_parts(products, image, product_parts, channels, PARTS, BLOCK_C) * rstd
    if HAS_KEEP:
        grad_scale *= tl.load(keep + image)
    tl.store(out + c, grad_scale, c < channels)
    slope = tl.sum(grad_scale * tl.load(scale + c, c < channels, 0.0)) * rstd * rstd / size
    tl.store(slopes + image, -slope)
    tl.store(out + channels + c, _sum_parts(branch_sums, image, branch_parts, channels, PARTS, BLOCK_C), c < channels)
    total = _sum_parts(hidden_sums, image, hidden_parts, 4 * channels, HIDDEN_PARTS, 4 * BLOCK_C)
    tl.store(out + 2 * channels + hidden, total, hidden < 4 * channels)


@triton.jit
def _mix_backward(
    grad, x, stats, scale, keep, slopes, residual_scale, out, sums, height, width, channels,
    HAS_KEEP: tl.constexpr, SCALED: tl.constexpr, RADIUS: tl.constexpr, LOOPS: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    image, first, column, c = _strip(width, BLOCK_W, BLOCK_C, LOOPS)
    start = image.to(tl.int64) * height * width * channels
    pixels, mean, slope = grad + start, tl.load(stats + 2 * image), tl.load(slopes + image)
    factor = tl.load(scale + c, c < channels, 0.0) * tl.load(stats + 2 * image + 1)
    if HAS_KEEP:
        factor = factor * tl.load(keep + image)
    rows = _first_rows(pixels, first, column, c, height, width, channels, 1.0, RADIUS, True)
    products = tl.zeros([BLOCK_W, BLOCK_C], tl.float32)
    for loop in range(LOOPS):
        row = first + loop
        rows, total = _next_window(rows, pixels, row, column, c, height, width, channels, 1.0, RADIUS, True)
        offsets, mask = (row * width + column) * channels + c, (row < height) & (column < width) & (c < channels)
        grad_out = tl.load(pixels + offsets, mask, 0.0).to(tl.float32)
        values = tl.load(x + start + offsets, mask, 0.0).to(tl.float32)
        result = factor * (total - grad_out) + slope * (values - mean)
        if SCALED:
            products += grad_out * values
            grad_out = grad_out * tl.load(residual_scale + c, c < channels, 0.0)
        tl.store(out + start + offsets, grad_out + result, mask)
    if SCALED:
        tile = image.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        tl.store(sums + tile * channels + c, tl.sum(products, 0)[None, :], c < channels)


def mix(
    x: Tensor, stats: Tensor, scale: Tensor, keep: Tensor | None, size: int, eps: float, dtype: torch.dtype,
    residual_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return y = residual_scale * x + keep * scale * rstd * (pool(x) - x) in `dtype`, and the statistics of y."""
    tiles, blocks = strips(*x.shape[1:], size)
    out, moments = torch.empty_like(x, dtype=dtype), stats.new_empty((len(x), tiles[0] * tiles[1], 3))
    _mix[(*tiles, len(x))](
        x, stats, scale, scale if keep is None else keep, scale if residual_scale is None else residual_scale,
        out, moments, *x.shape[1:], HAS_KEEP=keep is not None, SCALED=residual_scale is not None, **blocks,
    )  # fmt: skip
    return out, combine_moments(moments, eps)


def normalize_backward(
    grad: Tensor,
    normed: Tensor,
    stats: Tensor,
    sums: Tensor,
    residual_grad: Tensor,
    x: Tensor,
    size: int,
    dtype: torch.dtype,
    residual_scale: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Return the gradient of y, and parts of the sums S of the mixer that computed y.

    Args:
        grad: gradient of `normed`.
        normed: y as `normalize` returned it.
        stats: the statistics of y.
        sums: parts of each image's sums of `grad` and of `grad` times `normed`, [B, parts, 2].
        residual_grad: added to the gradient of y, times `residual_scale`.
        x: the mixer's input.
        size: the mixer's window.
        dtype: type of the gradient of y.

    Returns:
        The gradient of y, parts of its products with pool(x) - x, [B, parts, C], and the gradient of `residual_scale`
        if there is one.
    """
    tiles, blocks = strips(*x.shape[1:], size)
    out, products = torch.empty_like(x, dtype=dtype), stats.new_empty((len(x), tiles[1], x.shape[3]))
    scaled = residual_scale is not None
    scale_products = torch.empty_like(products) if scaled else products
    _normalize_backward[(*tiles, len(x))](
        grad, normed, stats, sums, residual_grad, stats if residual_scale is None else residual_scale, x,
        out, products, scale_products, sums.shape[1], *x.shape[1:],
        SCALED=scaled, PARTS=next_power_of_2(sums.shape[1]), **blocks,
    )  # fmt: skip
    return (out, products, scale_products.sum((0, 1))) if scaled else (out, products)


def finish_sums(
    products: Tensor,
    branch_sums: Tensor,
    hidden_sums: Tensor,
    stats: Tensor,
    scale: Tensor,
    keep: Tensor | None,
    count: int,
) -> tuple[Tensor, Tensor]:
    """Sum the parts of each image.

    Args:
        products: parts of S, [B, parts, C].
        branch_sums: parts of the MLP branch's gradient, [B, parts, C].
        hidden_sums: parts of the hidden layer's gradient, [B, parts, 4C].
        stats, scale, keep: arguments of `mix`.
        count: values in an image.

    Returns:
        The factor of x - mean in the gradient of x, [B], and sums of each image: the gradient of `scale`, `branch_sums`
        and `hidden_sums`, [B, 6C].
    """
    images, channels = len(stats), len(scale)
    parts = [sums.shape[1] for sums in (products, branch_sums, hidden_sums)]
    slopes, out = stats.new_empty(images), stats.new_empty((images, 6 * channels))
    _finish_sums[(images,)](
        products, branch_sums, hidden_sums, stats, scale, scale if keep is None else keep, slopes, out,
        count, channels, *parts, HAS_KEEP=keep is not None, PARTS=min(16, next_power_of_2(max(parts[:2]))),
        HIDDEN_PARTS=min(16, next_power_of_2(parts[2])), BLOCK_C=next_power_of_2(channels), num_warps=8,
    )  # fmt: skip
    return slopes, out


def mix_backward(
    grad: Tensor, x: Tensor, stats: Tensor, scale: Tensor, keep: Tensor | None, slopes: Tensor, size: int,
    residual_scale: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return the gradient of `mix` for x, including the part through the statistics, and for residual_scale if any."""
    tiles, blocks = strips(*x.shape[1:], size)
    out, scaled = torch.empty_like(x), residual_scale is not None
    products = stats.new_empty((len(x), tiles[1], x.shape[3])) if scaled else stats
    _mix_backward[(*tiles, len(x))](
        grad, x, stats, scale, scale if keep is None else keep, slopes,
        scale if residual_scale is None else residual_scale, out, products, *x.shape[1:],
        HAS_KEEP=keep is not None, SCALED=scaled, **blocks,
    )  # fmt: skip
    return (out, products.sum((0, 1))) if scaled else (out,)

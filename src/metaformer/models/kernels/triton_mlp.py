"""Triton kernels of the whole MLP branch in half precision: matrix products and what is between them in one pass.

The hidden layer never reaches memory in the forward pass, and the backward pass computes it again. This pays where
products are limited by memory, which is where images have few channels.

Bytes moved per element of x, where e is the element size of the stream and h that of the matrix products, for a hidden
layer of four times the channels: `mlp` 2 e + h (also the next norm's statistics), `mlp_backward` 10 h (also sums).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from metaformer.models.kernels.triton_elementwise import normal_cdf, normal_density
from metaformer.models.kernels.triton_tiles import (
    cdiv,
    combine_moments,
    next_power_of_2,
    store_moments,
    tile_number,
    tile_offsets,
)

ROWS, COLUMNS = 64, 64  # tile size of the hidden layer
COLUMNS_AT_ONCE = 32  # of the hidden layer in `mlp`, few enough that four programs fit in a multiprocessor's registers
MAX_LOOPS = 7  # adjacent tiles of an image along the rows, summed by one program of `mlp_backward`
ACTIVATIONS = ("gelu", "squared_relu")
SMALLEST_PRODUCT = 16  # channels that tl.dot needs at least


@triton.jit
def _mlp(
    x, stats, fc1, bias1, fc2, bias2, scale, keep, residual_scale, normed, out, moments, positions, channels,
    HAS_KEEP: tl.constexpr, SCALED: tl.constexpr, SQUARED_RELU: tl.constexpr, LOOPS: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    image, p, c, offsets, mask = tile_offsets(positions, channels, BLOCK_P, BLOCK_C)
    columns = 4 * channels
    values = tl.load(x + offsets, mask, 0.0).to(tl.float32)
    normalized = (values - tl.load(stats + 2 * image)) * tl.load(stats + 2 * image + 1)
    normalized = tl.where(mask, normalized, 0.0).to(normed.dtype.element_ty)
    tl.store(normed + offsets, normalized, mask)
    along = tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for loop in range(LOOPS):
        column = loop * COLUMNS + tl.arange(0, COLUMNS)
        inside = (along[:, None] < channels) & (column < columns)[None, :]
        weights1 = tl.load(fc1 + column[None, :] * channels + along[:, None], inside, 0.0)
        offset = tl.load(bias1 + column, column < columns, 0.0).to(tl.float32)
        hidden = tl.dot(normalized, weights1) + offset[None, :]
        if SQUARED_RELU:
            positive = tl.maximum(hidden, 0.0)
            activated = positive * positive
        else:
            activated = hidden * normal_cdf(hidden)
        within = (column < columns)[:, None] & (c < channels)
        weights2 = tl.load(fc2 + c * columns + column[:, None], within, 0.0)
        total = tl.dot(activated.to(normed.dtype.element_ty), weights2, total)
    factor = tl.load(scale)
    if HAS_KEEP:
        factor = factor * tl.load(keep + image)
    branch = (total + tl.load(bias2 + c, c < channels, 0.0).to(tl.float32)) * factor
    identity = tl.load(x + offsets, mask, 0.0).to(tl.float32)
    if SCALED:
        identity = identity * tl.load(residual_scale + c, c < channels, 0.0)
    result = (identity + branch).to(out.dtype.element_ty)
    tl.store(out + offsets, result, mask)
    store_moments(result.to(tl.float32), mask, positions, channels, moments)


@triton.jit
def _mlp_backward(
    grad, normed, fc1, bias1, fc2, factor, row_sums, grad_hidden, activated, sums, norm_sums, positions, channels,
    SQUARED_RELU: tl.constexpr, LOOPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    columns = 4 * channels
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    c = tl.arange(0, BLOCK_C)
    inside = (c < channels)[:, None] & (column < columns)[None, :]
    weights1 = tl.load(fc1 + column[None, :] * channels + c[:, None], inside, 0.0)
    weights2 = tl.load(fc2 + c[:, None] * columns + column[None, :], inside, 0.0)
    grad_factor = tl.load(factor)
    offset = tl.load(bias1 + column, column < columns, 0.0).to(tl.float32)[None, :]
    image = tl.program_id(2).to(tl.int64)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    products = tl.zeros([ROWS], tl.float32)
    for loop in range(LOOPS):
        position = (tl.program_id(1) * LOOPS + loop) * ROWS + tl.arange(0, ROWS)
        pixels = image * positions * channels + position[:, None] * channels + c[None, :]
        valid = (position < positions)[:, None] & (c < channels)[None, :]
        hidden = tl.dot(tl.load(normed + pixels, valid, 0.0), weights1) + offset
        grad_out = tl.dot(tl.load(grad + pixels, valid, 0.0), weights2) * grad_factor
        if SQUARED_RELU:
            positive = tl.maximum(hidden, 0.0)
            value = positive * positive
            slope = 2 * positive
        else:
            below = normal_cdf(hidden)
            value = hidden * below
            slope = below + hidden * normal_density(hidden)
        result = grad_out * slope
        offsets = image * positions * columns + position[:, None] * columns + column[None, :]
        mask = (position < positions)[:, None] & (column < columns)[None, :]
        tl.store(activated + offsets, value, mask)
        tl.store(grad_hidden + offsets, result, mask)
        total += result
        products += tl.sum(result * (hidden - offset), 1)  # keeping the difference would spill on sm_89
    part = tile_number()
    total_of_columns = tl.sum(total, 0)
    tl.store(sums + part * columns + column, total_of_columns, column < columns)
    pointer = norm_sums + 2 * (part * tl.num_programs(0) + tl.program_id(0))
    tl.store(pointer, tl.sum(total_of_columns * tl.load(row_sums + column, column < columns, 0.0)))
    tl.store(pointer + 1, tl.sum(products))


def mlp(
    x: Tensor,
    stats: Tensor,
    fc1: Tensor,
    bias1: Tensor,
    fc2: Tensor,
    bias2: Tensor,
    factor: Tensor,
    keep: Tensor | None,
    activation: str,
    eps: float,
    dtype: torch.dtype,
    residual_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute y = residual_scale * x + keep * factor * (fc2 activation(fc1 u + bias1) + bias2), with u x normalised.

    Args:
        x: images.
        stats: the statistics of x.
        fc1, bias1, fc2, bias2: the layers, [4C, C], [4C], [C, 4C] and [C], in half precision.
        factor: a factor of the branch, [1].
        keep: drop path's factor per image, [B], or None.
        activation: "gelu" or "squared_relu".
        eps: epsilon of the statistics of y.
        dtype: type of y.
        residual_scale: factor of x in the sum, [C], or None.

    Returns:
        u in the layers' type, y, and the statistics of y.
    """
    images, height, width, channels = x.shape
    positions = height * width
    normed, out = torch.empty_like(x, dtype=fc1.dtype), torch.empty_like(x, dtype=dtype)
    tiles = cdiv(positions, ROWS)
    moments = stats.new_empty((images, tiles, 3))
    _mlp[1, tiles, images](
        x, stats, fc1, bias1, fc2, bias2, factor, factor if keep is None else keep,
        factor if residual_scale is None else residual_scale, normed, out, moments, positions, channels,
        HAS_KEEP=keep is not None, SCALED=residual_scale is not None, SQUARED_RELU=bool(ACTIVATIONS.index(activation)),
        LOOPS=cdiv(4 * channels, COLUMNS_AT_ONCE), COLUMNS=COLUMNS_AT_ONCE, BLOCK_P=ROWS,
        BLOCK_C=max(SMALLEST_PRODUCT, next_power_of_2(channels)), num_warps=4, num_stages=2,
    )  # fmt: skip
    return normed, out, combine_moments(moments, eps)


def mlp_backward(
    grad: Tensor,
    normed: Tensor,
    fc1: Tensor,
    bias1: Tensor,
    row_sums: Tensor,
    fc2: Tensor,
    factor: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradient of the hidden layer fc1 u + bias1, which is computed again, and parts of sums of it.

    Args:
        grad: gradient e of the branch, in the layers' type.
        normed: u as `mlp` returned it.
        fc1, bias1, fc2: the layers.
        row_sums: the sums over fc1's rows.
        factor: a factor of the result, [1].
        activation: "gelu" or "squared_relu".

    Returns:
        The gradient factor * (fc2^T e) * (the activation's derivative), the activated hidden layer, and the parts of
        sums that `gelu_backward` returns.
    """
    images, height, width, channels = normed.shape
    positions, columns = height * width, 4 * channels
    column_tiles, parts = cdiv(columns, COLUMNS), cdiv(positions, ROWS * MAX_LOOPS)
    grad_hidden, activated = (normed.new_empty((images, height, width, columns)) for _ in range(2))
    sums = factor.new_empty((images, parts, columns))
    norm_sums = factor.new_empty((images, parts * column_tiles, 2))
    _mlp_backward[column_tiles, parts, images](
        grad, normed, fc1, bias1, fc2, factor, row_sums, grad_hidden, activated, sums, norm_sums, positions, channels,
        SQUARED_RELU=bool(ACTIVATIONS.index(activation)), LOOPS=cdiv(positions, ROWS * parts),
        ROWS=ROWS, COLUMNS=COLUMNS, BLOCK_C=max(SMALLEST_PRODUCT, next_power_of_2(channels)), num_warps=4, num_stages=1,
    )  # fmt: skip
    return grad_hidden, activated, sums, norm_sums

"""Triton kernels between matrix products: GELU or squared ReLU, and the residual with layer scale and drop path.

Bytes moved per element, where e is the element size of the stream and h that of the matrix products: `gelu` and
`squared_relu` 2 h, their backward passes 3 h (also sums), `residual` 2 e + h (also the next norm's statistics),
`residual_backward` e + h (also a sum over rows). Each of them is one pass.

The normal distribution's tail is 2 to the power of a polynomial that was fitted to its logarithm. That takes less than
half the instructions of erf, with an absolute error below 5e-7 in GELU and its derivative for numbers up to 8.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from metaformer.models.kernels.triton_tiles import (
    cdiv,
    combine_moments,
    store_moments,
    tile_number,
    tile_offsets,
    tiling,
)

ROWS, COLUMNS = 16, 128  # tile size of the hidden layer
MAX_LOOPS = 16  # adjacent tiles of an image along the rows, summed by one program


@triton.jit
def normal_cdf(x):
    """The cumulative distribution function of the standard normal distribution, within 3e-7 in float32."""
    a = tl.minimum(tl.abs(x), 12.0)  # where the tail is 1e-33; the polynomial would grow from 20 on
    cubic = -0.0530703771 + a * (0.00785383861 + a * (-0.000699174094 + a * 2.50351006e-05))
    tail = tl.exp2(-0.999999547 + a * (-1.15112886 + a * (-0.459014014 + a * cubic)))
    return tl.where(x < 0, tail, 1 - tail)


@triton.jit
def normal_density(x):
    return tl.exp2(x * (x * -0.7213475204444817)) * 0.3989422804014327


@triton.jit
def _activation(hidden, out, count, SQUARED_RELU: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(hidden + offsets, offsets < count, 0.0).to(tl.float32)
    if SQUARED_RELU:
        positive = tl.maximum(x, 0.0)
        tl.store(out + offsets, positive * positive, offsets < count)
    else:
        tl.store(out + offsets, x * normal_cdf(x), offsets < count)


@triton.jit
def _activation_backward(
    grad, hidden, factor, bias, row_sums, sums, norm_sums, positions, columns, SQUARED_RELU: tl.constexpr,
    LOOPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    start = tl.program_id(2).to(tl.int64) * positions * columns
    grad_factor, offset = tl.load(factor), tl.load(bias + column, column < columns, 0.0).to(tl.float32)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    products = tl.zeros([ROWS, COLUMNS], tl.float32)
    for loop in range(LOOPS):
        position = (tl.program_id(1) * LOOPS + loop) * ROWS + tl.arange(0, ROWS)[:, None]
        mask = (position < positions) & (column < columns)
        offsets = start + position * columns + column
        x = tl.load(hidden + offsets, mask, 0.0).to(tl.float32)
        grad_out = tl.load(grad + offsets, mask, 0.0).to(tl.float32) * grad_factor
        slope = 2 * tl.maximum(x, 0.0) if SQUARED_RELU else normal_cdf(x) + x * normal_density(x)
        result = grad_out * slope
        tl.store(grad + offsets, result, mask)
        total += result
        products += result * (x - offset)
    part = tile_number()
    total_of_columns = tl.sum(total, 0)[None, :]
    tl.store(sums + part * columns + column, total_of_columns, column < columns)
    pointer = norm_sums + 2 * (part * tl.num_programs(0) + tl.program_id(0))
    tl.store(pointer, tl.sum(total_of_columns * tl.load(row_sums + column, column < columns, 0.0)))
    tl.store(pointer + 1, tl.sum(products))


@triton.jit
def _residual(
    x, branch, scale, keep, residual_scale, out, moments, positions, channels,
    HAS_KEEP: tl.constexpr, SCALED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    image, p, c, offsets, mask = tile_offsets(positions, channels, BLOCK_P, BLOCK_C)
    factor = tl.load(scale)
    if HAS_KEEP:
        factor = factor * tl.load(keep + image)
    scaled = tl.load(branch + offsets, mask, 0.0).to(tl.float32) * factor
    identity = tl.load(x + offsets, mask, 0.0).to(tl.float32)
    if SCALED:
        identity = identity * tl.load(residual_scale + c, c < channels, 0.0)
    result = (identity + scaled).to(out.dtype.element_ty)
    tl.store(out + offsets, result, mask)
    store_moments(result.to(tl.float32), mask, positions, channels, moments)


@triton.jit
def _residual_backward(
    grad, keep, out, sums, positions, channels,
    HAS_KEEP: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    image, p, c, offsets, mask = tile_offsets(positions, channels, BLOCK_P, BLOCK_C)
    branch_grad = tl.load(grad + offsets, mask, 0.0).to(tl.float32)
    if HAS_KEEP:
        branch_grad = branch_grad * tl.load(keep + image)
    tl.store(out + offsets, branch_grad, mask)
    tl.store(sums + tile_number() * channels + c, tl.sum(branch_grad, 0)[None, :], c < channels)


def gelu(hidden: Tensor) -> Tensor:
    """Return x * Phi(x), with the normal distribution function Phi."""
    return _activate(hidden, squared_relu=False)


def gelu_backward(
    grad: Tensor, hidden: Tensor, factor: Tensor, bias: Tensor, row_sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient for `hidden`, and parts of the sums of the gradient that others need.

    Args:
        grad: gradient of gelu(hidden) before it is multiplied by `factor`; it is overwritten.
        hidden: the hidden layer, W u + `bias` with `row_sums` the sums over W's rows.
        factor: a factor of the result, [1].

    Returns:
        The gradient g, parts of each image's sums of g, [B, parts, 4C], and parts of each image's sums of u's gradient
        W^T g and of its product with u, [B, parts, 2].
    """
    return _activate_backward(grad, hidden, factor, bias, row_sums, squared_relu=False)


def squared_relu(hidden: Tensor) -> Tensor:
    """Return relu(x)^2."""
    return _activate(hidden, squared_relu=True)


def squared_relu_backward(
    grad: Tensor, hidden: Tensor, factor: Tensor, bias: Tensor, row_sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `gelu_backward` returns, for relu(hidden)^2."""
    return _activate_backward(grad, hidden, factor, bias, row_sums, squared_relu=True)


def _activate(hidden: Tensor, squared_relu: bool) -> Tensor:
    out = torch.empty_like(hidden)
    grid = (cdiv(hidden.numel(), 2048),)
    _activation[grid](hidden, out, hidden.numel(), SQUARED_RELU=squared_relu, BLOCK=2048)
    return out


def _activate_backward(
    grad: Tensor, hidden: Tensor, factor: Tensor, bias: Tensor, row_sums: Tensor, squared_relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    images, height, width, columns = hidden.shape
    positions, column_tiles = height * width, cdiv(columns, COLUMNS)
    parts = cdiv(positions, ROWS * MAX_LOOPS)
    sums = hidden.new_empty((images, parts, columns), dtype=torch.float32)
    norm_sums = hidden.new_empty((images, parts * column_tiles, 2), dtype=torch.float32)
    _activation_backward[column_tiles, parts, images](
        grad, hidden, factor, bias, row_sums, sums, norm_sums, positions, columns,
        SQUARED_RELU=squared_relu, LOOPS=cdiv(positions, ROWS * parts), ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip
    return grad, sums, norm_sums


def residual(
    x: Tensor, branch: Tensor, factor: Tensor, keep: Tensor | None, eps: float, dtype: torch.dtype,
    residual_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return y = residual_scale * x + keep * factor * branch in `dtype`, and the statistics of y; `factor` is [1]."""
    tiles = tiling(*x.shape)
    out, moments = torch.empty_like(x, dtype=dtype), tiles.new_moments(x)
    _residual[tiles.grid](
        x, branch, factor, factor if keep is None else keep, factor if residual_scale is None else residual_scale,
        out, moments, *tiles.sizes, HAS_KEEP=keep is not None, SCALED=residual_scale is not None, **tiles.blocks,
    )  # fmt: skip
    return out, combine_moments(moments, eps)


def residual_backward(grad: Tensor, keep: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return keep * grad in `dtype`, and parts of its sums over each image's positions, [B, parts, C]."""
    tiles = tiling(*grad.shape)
    out = torch.empty_like(grad, dtype=dtype)
    sums = tiles.new_sums(grad, grad.shape[3])
    _residual_backward[tiles.grid](
        grad, grad if keep is None else keep, out, sums, *tiles.sizes,
        HAS_KEEP=keep is not None, **tiles.blocks,
    )  # fmt: skip
    return out, sums

"""Triton kernels between matrix products: GELU or squared ReLU, and the residual with layer scale and drop path.

Bytes moved per element, where e is the element size of the stream and h that of the matrix products: `gelu` and
`squared_relu` 2 h, their backward passes 4 h (also a sum over rows and the recomputed activation), `residual` 2 e + h
(also the next norm's statistics), `residual_backward` e + h (also a sum over rows). Each of them is one pass.

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
TILES_PER_PROGRAM = 16  # adjacent tiles along the rows, summed by one program


@triton.jit
def _normal_cdf(x):
    """The cumulative distribution function of the standard normal distribution, within 3e-7 in float32."""
    a = tl.minimum(tl.abs(x), 12.0)  # where the tail is 1e-33; the polynomial would grow from 20 on
    cubic = -0.0530703771 + a * (0.00785383861 + a * (-0.000699174094 + a * 2.50351006e-05))
    tail = tl.exp2(-0.999999547 + a * (-1.15112886 + a * (-0.459014014 + a * cubic)))
    return tl.where(x < 0, tail, 1 - tail)


@triton.jit
def _normal_density(x):
    return tl.exp2(x * (x * -0.7213475204444817)) * 0.3989422804014327


@triton.jit
def _value_and_slope(x, SQUARED_RELU: tl.constexpr):
    """The activation and its derivative: GELU, or relu(x)^2."""
    if SQUARED_RELU:
        positive = tl.maximum(x, 0.0)
        return positive * positive, 2 * positive
    else:
        cdf = _normal_cdf(x)
        return x * cdf, cdf + x * _normal_density(x)


@triton.jit
def _activation(hidden, out, count, SQUARED_RELU: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(hidden + offsets, offsets < count, 0.0).to(tl.float32)
    if SQUARED_RELU:
        positive = tl.maximum(x, 0.0)
        tl.store(out + offsets, positive * positive, offsets < count)
    else:
        tl.store(out + offsets, x * _normal_cdf(x), offsets < count)


@triton.jit
def _activation_backward(
    grad, hidden, factor, activated, sums, rows, columns, SQUARED_RELU: tl.constexpr,
    HAS_FACTOR: tl.constexpr, LOOPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    grad_factor = tl.load(factor) if HAS_FACTOR else 1.0
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for loop in range(LOOPS):
        row = (tl.program_id(0) * LOOPS + loop) * ROWS + tl.arange(0, ROWS)[:, None]
        mask = (row < rows) & (column < columns)
        offsets = row.to(tl.int64) * columns + column
        x = tl.load(hidden + offsets, mask, 0.0).to(tl.float32)
        grad_out = tl.load(grad + offsets, mask, 0.0).to(tl.float32) * grad_factor
        value, slope = _value_and_slope(x, SQUARED_RELU)
        result = grad_out * slope
        tl.store(grad + offsets, result, mask)
        tl.store(activated + offsets, value, mask)
        total += result
    pointer = sums + tl.program_id(0).to(tl.int64) * columns + column
    tl.store(pointer, tl.sum(total, 0)[None, :], column < columns)


@triton.jit
def _residual(
    x, branch, scale, keep, out, moments, positions, channels,
    HAS_KEEP: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    image, p, c, offsets, mask = tile_offsets(positions, channels, BLOCK_P, BLOCK_C)
    factor = tl.load(scale + c, c < channels, 0.0)
    if HAS_KEEP:
        factor = factor * tl.load(keep + image)
    scaled = tl.load(branch + offsets, mask, 0.0).to(tl.float32) * factor
    result = (tl.load(x + offsets, mask, 0.0).to(tl.float32) + scaled).to(out.dtype.element_ty)
    tl.store(out + offsets, result, mask)
    store_moments(result.to(tl.float32), mask, moments)


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


def gelu_backward(grad: Tensor, hidden: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient for `hidden` times `factor` (a scalar), gelu(hidden), and the gradient's sum [4C].

    `grad` is overwritten.
    """
    return _activate_backward(grad, hidden, factor, squared_relu=False)


def squared_relu(hidden: Tensor) -> Tensor:
    """Return relu(x)^2."""
    return _activate(hidden, squared_relu=True)


def squared_relu_backward(grad: Tensor, hidden: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient for `hidden` times `factor` (a scalar), squared_relu(hidden), and the gradient's sum [4C].

    `grad` is overwritten.
    """
    return _activate_backward(grad, hidden, factor, squared_relu=True)


def _activate(hidden: Tensor, squared_relu: bool) -> Tensor:
    out = torch.empty_like(hidden)
    grid = (cdiv(hidden.numel(), 2048),)
    _activation[grid](hidden, out, hidden.numel(), SQUARED_RELU=squared_relu, BLOCK=2048)
    return out


def _activate_backward(
    grad: Tensor, hidden: Tensor, factor: Tensor | None, squared_relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    columns = hidden.shape[3]
    rows = hidden.numel() // columns
    programs = cdiv(rows, ROWS * TILES_PER_PROGRAM)
    activated = torch.empty_like(hidden)
    sums = hidden.new_empty((programs, columns), dtype=torch.float32)
    _activation_backward[programs, cdiv(columns, COLUMNS)](
        grad, hidden, hidden if factor is None else factor, activated, sums, rows, columns,
        SQUARED_RELU=squared_relu, HAS_FACTOR=factor is not None, LOOPS=TILES_PER_PROGRAM, ROWS=ROWS, COLUMNS=COLUMNS,
        num_warps=8,
    )  # fmt: skip
    return grad, activated, sums.sum(0)


def residual(x: Tensor, branch: Tensor, scale: Tensor, keep: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Return y = x + keep * scale * branch in the type of x, and the statistics of y."""
    tiles = tiling(*x.shape)
    out, moments = torch.empty_like(x), tiles.new_moments(x)
    _residual[tiles.grid](
        x, branch, scale, scale if keep is None else keep, out, moments, *tiles.sizes,
        HAS_KEEP=keep is not None, **tiles.blocks,
    )  # fmt: skip
    return out, combine_moments(moments, eps)


def residual_backward(grad: Tensor, keep: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return keep * grad in `dtype`, and its sum over images and positions, [C]."""
    tiles = tiling(*grad.shape)
    out = torch.empty_like(grad, dtype=dtype)
    sums = tiles.new_sums(grad, grad.shape[3])
    _residual_backward[tiles.grid](
        grad, grad if keep is None else keep, out, sums, *tiles.sizes,
        HAS_KEEP=keep is not None, **tiles.blocks,
    )  # fmt: skip
    return out, sums.sum((0, 1))

"""Triton kernels that prepare a block's weights, and that turn sums over positions into the gradients of parameters.

They move little memory. Each takes the place of several launches of torch's own kernels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from metaformer.models.kernels.triton_tiles import cdiv, next_power_of_2

TILE = 4096  # elements
COLUMNS, ROWS = 16, 128  # tile size of `fc1_gradients`


@triton.jit
def _fold_norms(
    fc1, bias1, weight, bias, mixer_weight, mixer_scale, out, out_bias, row_sums, scale, rows, channels,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK_C)[None, :]
    offsets, mask = row[:, None] * channels + c, (row[:, None] < rows) & (c < channels)
    matrix = tl.load(fc1 + offsets, mask, 0.0).to(tl.float32)
    folded = (matrix * tl.load(weight + c, c < channels, 0.0).to(tl.float32)).to(out.dtype.element_ty)
    tl.store(out + offsets, folded, mask)
    tl.store(row_sums + row, tl.sum(folded.to(tl.float32), 1), row < rows)
    product = tl.sum(matrix * tl.load(bias + c, c < channels, 0.0).to(tl.float32), 1)
    tl.store(out_bias + row, tl.load(bias1 + row, row < rows, 0.0).to(tl.float32) + product, row < rows)
    if tl.program_id(0) == 0:
        weights = tl.load(mixer_weight + c, c < channels, 0.0).to(tl.float32)
        tl.store(scale + c, weights * tl.load(mixer_scale + c, c < channels, 0.0), c < channels)


@triton.jit
def _scale_rows(
    fc2, bias2, scale, out, out_bias, magnitude, channels, columns,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    c = tl.arange(0, BLOCK_C)
    largest = tl.max(tl.abs(tl.load(scale + c, c < channels, 0.0).to(tl.float32)))
    largest = tl.maximum(largest, 1.1754943508222875e-38)  # the smallest normal float32
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)[None, :]
    relative = tl.load(scale + row, row < channels, 0.0).to(tl.float32) / largest
    offsets, mask = row[:, None] * columns + column, (row[:, None] < channels) & (column < columns)
    tl.store(out + offsets, tl.load(fc2 + offsets, mask, 0.0).to(tl.float32) * relative[:, None], mask)
    tl.store(out_bias + row, tl.load(bias2 + row, row < channels, 0.0).to(tl.float32) * relative, row < channels)
    if tl.program_id(0) == 0:
        tl.store(magnitude, largest)


@triton.jit
def _fc1_gradients(
    correlation, fc1, weight, bias, mixer_weight, mixer_scale, sums,
    grad_mixer_weight, grad_mixer_bias, grad_mixer_scale, grad_weight, grad_bias, grad_fc1, grad_bias1, rows, channels,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    valid = c < channels
    weights, biases = tl.load(weight + c, valid, 0.0).to(tl.float32), tl.load(bias + c, valid, 0.0).to(tl.float32)
    for_weight = tl.zeros([ROWS, COLUMNS], tl.float32)
    for_bias = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        grad = tl.load(sums + 2 * channels + row, row < rows, 0.0)
        tl.store(grad_bias1 + row, grad, (row < rows) & (tl.program_id(0) == 0))
        offsets, mask = row[:, None] * channels + c[None, :], (row < rows)[:, None] & valid[None, :]
        product = tl.load(correlation + offsets, mask, 0.0).to(tl.float32)
        matrix = tl.load(fc1 + offsets, mask, 0.0).to(tl.float32)
        tl.store(grad_fc1 + offsets, product * weights[None, :] + grad[:, None] * biases[None, :], mask)
        for_weight += matrix * product
        for_bias += matrix * grad[:, None]
    tl.store(grad_weight + c, tl.sum(for_weight, 0), valid)
    tl.store(grad_bias + c, tl.sum(for_bias, 0), valid)
    grad_scale = tl.load(sums + c, valid, 0.0)
    tl.store(grad_mixer_weight + c, grad_scale * tl.load(mixer_scale + c, valid, 0.0), valid)
    tl.store(grad_mixer_scale + c, grad_scale * tl.load(mixer_weight + c, valid, 0.0), valid)
    tl.store(grad_mixer_bias + c, tl.zeros([COLUMNS], tl.float32), valid)


@triton.jit
def _fc2_gradients(
    correlation, fc2, bias2, scale, sums, grad_fc2, grad_bias2, grad_scale, channels, columns,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)[None, :]
    offsets, mask = row[:, None] * columns + column, (row[:, None] < channels) & (column < columns)
    factor = tl.load(scale + row, row < channels, 0.0).to(tl.float32)
    product = tl.load(correlation + offsets, mask, 0.0).to(tl.float32)
    tl.store(grad_fc2 + offsets, product * factor[:, None], mask)
    branch_sum = tl.load(sums + channels + row, row < channels, 0.0)
    tl.store(grad_bias2 + row, factor * branch_sum, row < channels)
    from_bias = tl.load(bias2 + row, row < channels, 0.0).to(tl.float32) * branch_sum
    from_matrix = tl.sum(product * tl.load(fc2 + offsets, mask, 0.0).to(tl.float32), 1)
    tl.store(grad_scale + row, from_matrix + from_bias, row < channels)


def _rows(columns: int) -> tuple[int, int]:
    """Return the rows and columns of a tile that contains whole rows."""
    block = next_power_of_2(columns)
    return max(1, TILE // block), block


def fold_norms(
    fc1: Tensor,
    bias1: Tensor,
    weight: Tensor,
    bias: Tensor,
    mixer_weight: Tensor,
    mixer_scale: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the MLP's first layer in `dtype` with norm2 folded in, and the mixer's `scale`.

    Args:
        fc1, bias1, weight, bias: the layer, and norm2's parameters.
        mixer_weight, mixer_scale: norm1's weight and the mixer's layer scale.

    Returns:
        The layer's matrix and bias, sums over the matrix' rows, and the product of norm1's weight and the layer scale.
    """
    rows, channels = fc1.shape
    block_rows, block = _rows(channels)
    out, out_bias = torch.empty_like(fc1, dtype=dtype), torch.empty_like(bias1, dtype=dtype)
    row_sums, scale = (torch.empty_like(each, dtype=torch.float32) for each in (bias1, weight))
    _fold_norms[(cdiv(rows, block_rows),)](
        fc1, bias1, weight, bias, mixer_weight, mixer_scale, out, out_bias, row_sums, scale, rows, channels,
        ROWS=block_rows, BLOCK_C=block, num_warps=8,
    )  # fmt: skip
    return out, out_bias, row_sums, scale


def scale_rows(fc2: Tensor, bias2: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return the MLP's second layer in `dtype`, with its layer scale folded in but for its size, and that size.

    Returns:
        The layer's matrix and bias, times `scale` divided by its largest magnitude, and that magnitude, [1]. In
        float16, a layer scale of 1e-5 times a weight would underflow.
    """
    channels, columns = fc2.shape
    rows, block = _rows(columns)
    out, out_bias = torch.empty_like(fc2, dtype=dtype), torch.empty_like(bias2, dtype=dtype)
    magnitude = fc2.new_empty(1, dtype=torch.float32)
    _scale_rows[(cdiv(channels, rows),)](
        fc2, bias2, scale, out, out_bias, magnitude, channels, columns,
        ROWS=rows, BLOCK_C=next_power_of_2(channels), BLOCK=block, num_warps=8,
    )  # fmt: skip
    return out, out_bias, magnitude


def fc1_gradients(
    correlation: Tensor,
    fc1: Tensor,
    weight: Tensor,
    bias: Tensor,
    mixer_weight: Tensor,
    mixer_scale: Tensor,
    sums: Tensor,
) -> tuple[Tensor, ...]:
    """Return the gradients of norm1, the mixer's layer scale, norm2 and the MLP's first layer.

    Args:
        correlation: the sum over positions of the hidden layer's gradient times the normalised pixels, [4C, C].
        fc1, weight, bias: the first layer's matrix, and norm2's parameters.
        mixer_weight, mixer_scale: norm1's weight and the mixer's layer scale.
        sums: those of `finish_sums`, of all images, [6C].
    """
    rows, channels = fc1.shape
    grads = [torch.empty_like(each) for each in (mixer_weight, mixer_weight, mixer_scale, weight, bias, fc1)]
    grads.append(fc1.new_empty(rows))
    _fc1_gradients[(cdiv(channels, COLUMNS),)](
        correlation, fc1, weight, bias, mixer_weight, mixer_scale, sums, *grads, rows, channels,
        ROWS=ROWS, COLUMNS=COLUMNS,
    )  # fmt: skip
    return tuple(grads)


def fc2_gradients(
    correlation: Tensor, fc2: Tensor, bias2: Tensor, scale: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the MLP's second layer and its layer scale.

    Args:
        correlation: the sum over positions of the branch's gradient times the activated hidden layer, [C, 4C].
        fc2, bias2, scale: the second layer, and the layer scale.
        sums: those of `finish_sums`, of all images, [6C].
    """
    channels, columns = fc2.shape
    rows, block = _rows(columns)
    grad_fc2, grad_bias2, grad_scale = torch.empty_like(fc2), torch.empty_like(bias2), torch.empty_like(scale)
    _fc2_gradients[(cdiv(channels, rows),)](
        correlation, fc2, bias2, scale, sums, grad_fc2, grad_bias2, grad_scale, channels, columns,
        ROWS=rows, BLOCK=block, num_warps=8,
    )  # fmt: skip
    return grad_fc2, grad_bias2, grad_scale

"""A block as a differentiable torch operator, for eager and compiled networks.

Images are [B, C, H, W], and returned images are channels_last. They are float32 or of the matrix products' type. The
formulas are in the package's docstring.

Each operator has a fake implementation that returns the shapes, types and strides of the results without computing
them. The compiler relies on it, so it must match the real results exactly.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaformer.models.kernels.backend import Kernels, triton_kernels


class Parameters(NamedTuple):
    """The parameters of a block: matrices [4C, C] and [C, 4C], bias1 [4C], and all others [C]."""

    norm1_weight: Tensor
    norm1_bias: Tensor
    scale1: Tensor
    norm2_weight: Tensor
    norm2_bias: Tensor
    fc1: Tensor
    bias1: Tensor
    fc2: Tensor
    bias2: Tensor
    scale2: Tensor


@torch.library.custom_op("metaformer::statistics", mutates_args=())
def statistics(x: Tensor, eps: float) -> Tensor:
    """Return mean and reciprocal deviation of each image, [B, 2], without a gradient; see the package's docstring."""
    return triton_kernels().statistics(_pixels(x), eps)


@statistics.register_fake
def _(x: Tensor, eps: float) -> Tensor:
    return _empty_statistics(x)


@torch.library.custom_op("metaformer::block", mutates_args=())
def block(
    x: Tensor,
    stats: Tensor,
    parameters: list[Tensor],
    keep: Tensor | None,
    size: int,
    activation: str,
    eps2: float,
    following_eps: float,
    dtype: torch.dtype,
    stream: torch.dtype,
    out: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute a block.

    Args:
        x: images.
        stats: the `statistics` of x.
        parameters: those of `Parameters`.
        keep: drop path's factors per image in both branches, [2, B], or None.
        size: side of the pooling window, odd.
        activation: "gelu" or "squared_relu".
        eps2: epsilon of norm2.
        following_eps: epsilon of the norm after the block.
        dtype: type of the matrix products.
        stream: type of the images between both branches.
        out: type of the returned images.

    Returns:
        Images with the shape of x, their statistics, and nine tensors for the backward pass: statistics between the
        branches, the pixels that norm2 normalises, the hidden layer before its activation, and small ones. Recomputing
        the activation is cheaper than storing it.
    """
    kernels, p = triton_kernels(), Parameters(*(parameter.contiguous() for parameter in parameters))
    keep1, keep2 = (None, None) if keep is None else keep
    fc1, bias1, row_sums, scale = kernels.fold_norms(
        p.fc1, p.bias1, p.norm2_weight, p.norm2_bias, p.norm1_weight, p.scale1, dtype
    )
    fc2, bias2, magnitude = kernels.scale_rows(p.fc2, p.bias2, p.scale2, dtype)
    y, y_stats = kernels.mix(_pixels(x), stats, scale, keep1, size, eps2, stream)
    normed = kernels.normalize(y, y_stats, dtype)
    hidden = _linear(normed, fc1, bias1)
    branch = _linear(_activation(kernels, activation)[0](hidden), fc2, bias2)
    z, z_stats = kernels.residual(y, branch, magnitude, keep2, following_eps, out)
    return _image(z), z_stats, y_stats, normed, hidden, scale, fc1, bias1, row_sums, fc2, magnitude


@block.register_fake
def _(
    x: Tensor,
    stats: Tensor,
    parameters: list[Tensor],
    keep: Tensor | None,
    size: int,
    activation: str,
    eps2: float,
    following_eps: float,
    dtype: torch.dtype,
    stream: torch.dtype,
    out: torch.dtype,
) -> tuple[Tensor, ...]:
    batch, channels, height, width = x.shape
    hidden = len(parameters[5])

    def empty(*shape: int, dtype: torch.dtype = stats.dtype) -> Tensor:
        return x.new_empty(shape, dtype=dtype)

    return (
        _empty_image(x, out), _empty_statistics(x), _empty_statistics(x),
        empty(batch, height, width, channels, dtype=dtype), empty(batch, height, width, hidden, dtype=dtype),
        empty(channels), empty(hidden, channels, dtype=dtype), empty(hidden, dtype=dtype), empty(hidden),
        empty(channels, hidden, dtype=dtype), empty(1),
    )  # fmt: skip


@torch.library.custom_op("metaformer::block_backward", mutates_args=())
def block_backward(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    parameters: list[Tensor],
    keep: Tensor | None,
    saved: list[Tensor],
    size: int,
    activation: str,
    stream: torch.dtype,
) -> list[Tensor]:
    """Return the gradients of `block` for x and the parameters."""
    kernels, p = triton_kernels(), Parameters(*(parameter.contiguous() for parameter in parameters))
    y_stats, normed, hidden, scale, fc1, bias1, row_sums, fc2, magnitude = saved
    keep1, keep2 = (None, None) if keep is None else keep
    pixels, grad = _pixels(x), _pixels(grad)
    branch_grad, branch_sums = kernels.residual_backward(grad, keep2, hidden.dtype)
    grad_hidden, activated, hidden_sums, norm_sums = _activation(kernels, activation)[1](
        _product(branch_grad, fc2), hidden, magnitude, bias1, row_sums
    )
    correlation2 = _correlation(branch_grad, activated)
    correlation1 = _correlation(grad_hidden, normed)
    grad_y, products = kernels.normalize_backward(
        _product(grad_hidden, fc1), normed, y_stats, norm_sums, grad, pixels, size, stream
    )
    slopes, sums = kernels.finish_sums(products, branch_sums, hidden_sums, stats, scale, keep1, pixels[0].numel())
    grad_x = kernels.mix_backward(grad_y, pixels, stats, scale, keep1, slopes, size)
    sums = sums.sum(0)
    grads2 = kernels.fc2_gradients(correlation2, p.fc2, p.bias2, p.scale2, sums)
    grads1 = kernels.fc1_gradients(correlation1, p.fc1, p.norm2_weight, p.norm2_bias, p.norm1_weight, p.scale1, sums)
    return [_image(grad_x), *grads1, *grads2]


@block_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    parameters: list[Tensor],
    keep: Tensor | None,
    saved: list[Tensor],
    size: int,
    activation: str,
    stream: torch.dtype,
) -> list[Tensor]:
    return [_empty_image(x, x.dtype), *(parameter.new_empty(parameter.shape) for parameter in parameters)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, stats, parameters, keep, ctx.size, ctx.activation, *_, ctx.stream, _ = inputs
    ctx.save_for_backward(x, stats, keep, *parameters, *output[2:])
    # The other outputs have no gradient; autograd would allocate zeros of their size.
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    count = len(Parameters._fields)
    if grad is None:
        return None, None, [None] * count, *[None] * 8
    x, stats, keep, *others = ctx.saved_tensors
    with torch.autocast(grad.device.type, enabled=False):  # the user may call backward under autocast
        grad_x, *grads = block_backward(
            grad, x, stats, others[:count], keep, others[count:], ctx.size, ctx.activation, ctx.stream
        )
    return grad_x, None, grads, *[None] * 8


block.register_autograd(_gradients, setup_context=_save)


def _activation(kernels: Kernels, name: str) -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, ...]]]:
    """Return the activation and its backward pass."""
    if name == "gelu":
        return kernels.gelu, kernels.gelu_backward
    if name == "squared_relu":
        return kernels.squared_relu, kernels.squared_relu_backward
    raise ValueError(f"activation {name}: must be gelu or squared_relu")


def _pixels(image: Tensor) -> Tensor:
    """Convert [B, C, H, W] to contiguous [B, H, W, C], without a copy if it is channels_last."""
    return image.permute(0, 2, 3, 1).contiguous()


def _image(pixels: Tensor) -> Tensor:
    return pixels.permute(0, 3, 1, 2)


def _empty_image(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an empty channels_last image batch with the shape of x."""
    batch, channels, height, width = x.shape
    return _image(x.new_empty((batch, height, width, channels), dtype=dtype))


def _empty_statistics(x: Tensor) -> Tensor:
    return x.new_empty((len(x), 2), dtype=torch.promote_types(x.dtype, torch.float32))


def _linear(pixels: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.addmm(bias, pixels.flatten(0, 2), weight.t()).view(*pixels.shape[:3], len(weight))


def _product(grad: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(grad.flatten(0, 2), weight).view(*grad.shape[:3], weight.shape[1])


def can_output_float32(x: Tensor) -> bool:
    """Return whether products of half types can be stored in float32: GPUs accumulate in it, CPUs do not support it."""
    return x.is_cuda


def _correlation(grad: Tensor, pixels: Tensor) -> Tensor:
    """Return the product over all positions, not in float16, in which the sum would overflow."""
    rows, columns = grad.flatten(0, 2).t(), pixels.flatten(0, 2)
    if rows.element_size() < 4 and can_output_float32(rows):
        return torch.mm(rows, columns, out_dtype=torch.float32)
    if rows.dtype is torch.float16:
        rows, columns = rows.float(), columns.float()
    return torch.mm(rows, columns)

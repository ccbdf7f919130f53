"""The two branches of a block as differentiable torch operators, for eager and compiled networks.

Images are [B, C, H, W], and returned images are channels_last. They are float32 or of the matrix products' type; the
residual stream keeps its type. The formulas are in the package's docstring.

Each operator has a fake implementation that returns the shapes, types and strides of the results without computing
them. The compiler relies on it, so it must match the real results exactly.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metaformer.models.kernels.backend import Kernels, triton_kernels


@torch.library.custom_op("metaformer::statistics", mutates_args=())
def statistics(x: Tensor, eps: float) -> Tensor:
    """Return mean and reciprocal deviation of each image, [B, 2], without a gradient; see the package's docstring."""
    return triton_kernels().statistics(_pixels(x), eps)


@statistics.register_fake
def _(x: Tensor, eps: float) -> Tensor:
    return _empty_statistics(x)


@torch.library.custom_op("metaformer::pool_branch", mutates_args=())
def pool_branch(
    x: Tensor, stats: Tensor, scale: Tensor, keep: Tensor | None, size: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Compute the token mixer branch and add it to its input.

    Args:
        x: images.
        stats: the `statistics` of x.
        scale: the norm's weight times the layer scale, [C].
        keep: drop path's factor per image, [B], or None.
        size: side of the pooling window, odd.
        eps: epsilon of the next norm.

    Returns:
        Images with the shape and type of x, and their statistics.
    """
    y, y_stats = triton_kernels().mix(_pixels(x), stats, scale.to(stats.dtype), keep, size, eps)
    return _image(y), y_stats


@pool_branch.register_fake
def _(x: Tensor, stats: Tensor, scale: Tensor, keep: Tensor | None, size: int, eps: float) -> tuple[Tensor, Tensor]:
    return _empty_image(x), _empty_statistics(x)


@torch.library.custom_op("metaformer::pool_branch_backward", mutates_args=())
def pool_branch_backward(
    grad: Tensor, x: Tensor, stats: Tensor, scale: Tensor, keep: Tensor | None, size: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `pool_branch` for x and scale."""
    acc = scale.to(stats.dtype)
    grad_x, grad_scale = triton_kernels().mix_backward(_pixels(grad), _pixels(x), stats, acc, keep, size)
    return _image(grad_x), _gradient_of(scale, grad_scale)


@pool_branch_backward.register_fake
def _(grad: Tensor, x: Tensor, stats: Tensor, scale: Tensor, keep: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    return _empty_image(x), _empty_gradient(scale)


def _save_for_pool(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, stats, scale, keep, ctx.size, _ = inputs
    ctx.save_for_backward(x, stats, scale, keep)
    _only_first_has_gradient(ctx, output)


def _pool_gradients(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    with torch.autocast(grad.device.type, enabled=False):
        grad_x, grad_scale = pool_branch_backward(grad, *ctx.saved_tensors, ctx.size)
    return grad_x, None, grad_scale, None, None, None


pool_branch.register_autograd(_pool_gradients, setup_context=_save_for_pool)


@torch.library.custom_op("metaformer::mlp_branch", mutates_args=())
def mlp_branch(
    x: Tensor,
    stats: Tensor,
    norm: list[Tensor],
    mlp: list[Tensor],
    scale: Tensor,
    keep: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the channel MLP branch and add it to its input.

    Args:
        x: images.
        stats: the `statistics` of x.
        norm: weight and bias of the norm, [C] each.
        mlp: weights and biases of both layers: [4C, C], [4C], [C, 4C], [C].
        scale: layer scale, [C].
        keep: drop path's factor per image, [B], or None.
        eps: epsilon of the next norm.
        dtype: type of the matrix products.
        activation: "gelu" or "squared_relu".

    Returns:
        Images with the shape and type of x, their statistics, and two tensors for the backward pass: the normalised
        pixels and the hidden layer before its activation. Recomputing the activation is cheaper than storing it.
    """
    kernels = triton_kernels()
    fc1, bias1, fc2, bias2 = (tensor.to(dtype) for tensor in mlp)
    pixels = _pixels(x)
    weight, bias, factor = (tensor.to(stats.dtype) for tensor in (*norm, scale))
    normed = kernels.normalize(pixels, stats, weight, bias, dtype)
    hidden = _linear(normed, fc1, bias1)
    branch = _linear(_activation(kernels, activation)[0](hidden), fc2, bias2)
    y, y_stats = kernels.residual(pixels, branch, factor, keep, eps)
    return _image(y), y_stats, normed, hidden


@mlp_branch.register_fake
def _(
    x: Tensor,
    stats: Tensor,
    norm: list[Tensor],
    mlp: list[Tensor],
    scale: Tensor,
    keep: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, channels, height, width = x.shape
    normed = x.new_empty((batch, height, width, channels), dtype=dtype)
    hidden = x.new_empty((batch, height, width, len(mlp[0])), dtype=dtype)
    return _empty_image(x), _empty_statistics(x), normed, hidden


@torch.library.custom_op("metaformer::mlp_branch_backward", mutates_args=())
def mlp_branch_backward(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    norm_weight: Tensor,
    mlp: list[Tensor],
    scale: Tensor,
    keep: Tensor | None,
    saved: list[Tensor],
    activation: str,
) -> list[Tensor]:
    """Return the gradients of `mlp_branch` for x, the norm's weight and bias, the four tensors of `mlp`, and scale."""
    kernels = triton_kernels()
    normed, hidden = saved
    dtype, acc = hidden.dtype, stats.dtype
    factor, weight, fc2, bias2 = (tensor.to(acc) for tensor in (scale, norm_weight, mlp[2], mlp[3]))
    max_scale = None
    if dtype is torch.float16:  # layer scale (initially 1e-6) times a weight would underflow: apply its size later
        max_scale = factor.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    pixels = _pixels(grad)
    branch_grad, branch_grad_sum = kernels.residual_backward(pixels, keep, dtype)
    relative_scale = factor if max_scale is None else factor / max_scale
    grad_activated = _product(branch_grad, (relative_scale[:, None] * fc2).to(dtype))
    activate_backward = _activation(kernels, activation)[1]
    grad_hidden, activated, grad_bias1 = activate_backward(grad_activated, hidden, max_scale)
    correlation = _weight_gradient(activated, branch_grad).t().to(acc)  # a tenth faster on a CPU than the other order
    grad_fc1 = _weight_gradient(grad_hidden, normed)
    grad_normed = _product(grad_hidden, mlp[0].to(dtype))
    grad_x, grad_weight, grad_bias = kernels.normalize_backward(grad_normed, _pixels(x), stats, weight, pixels)
    grad_fc2, grad_bias2 = correlation * factor[:, None], factor * branch_grad_sum
    grad_scale = torch.linalg.vecdot(correlation, fc2) + bias2 * branch_grad_sum
    grads = [grad_weight, grad_bias, grad_fc1, grad_bias1, grad_fc2, grad_bias2, grad_scale]
    inputs = [norm_weight, norm_weight, *mlp, scale]
    return [_image(grad_x), *(_gradient_of(tensor, value) for tensor, value in zip(inputs, grads, strict=True))]


@mlp_branch_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    norm_weight: Tensor,
    mlp: list[Tensor],
    scale: Tensor,
    keep: Tensor | None,
    saved: list[Tensor],
    activation: str,
) -> list[Tensor]:
    return [_empty_image(x), *(_empty_gradient(tensor) for tensor in (norm_weight, norm_weight, *mlp, scale))]


def _save_for_mlp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, stats, norm, mlp, scale, keep, _, _, ctx.activation = inputs
    ctx.save_for_backward(x, stats, norm[0], *mlp, scale, keep, *output[2:])
    _only_first_has_gradient(ctx, output)


def _mlp_gradients(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return None, None, [None] * 2, [None] * 4, None, None, None, None, None
    x, stats, norm_weight, fc1, bias1, fc2, bias2, scale, keep, *saved = ctx.saved_tensors
    with torch.autocast(grad.device.type, enabled=False):  # the user may call backward under autocast
        mlp = [fc1, bias1, fc2, bias2]
        grads = mlp_branch_backward(grad, x, stats, norm_weight, mlp, scale, keep, saved, ctx.activation)
    return grads[0], None, grads[1:3], grads[3:7], grads[7], None, None, None, None


mlp_branch.register_autograd(_mlp_gradients, setup_context=_save_for_mlp)


def _activation(kernels: Kernels, name: str) -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, ...]]]:
    """Return the activation and its backward pass."""
    if name == "gelu":
        return kernels.gelu, kernels.gelu_backward
    if name == "squared_relu":
        return kernels.squared_relu, kernels.squared_relu_backward
    raise ValueError(f"activation {name}: must be gelu or squared_relu")


def _only_first_has_gradient(ctx: Any, output: tuple[Tensor, ...]) -> None:
    """Give the other outputs no gradient, for which autograd would otherwise allocate zeros of their size."""
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _pixels(image: Tensor) -> Tensor:
    """Convert [B, C, H, W] to contiguous [B, H, W, C], without a copy if it is channels_last."""
    return image.permute(0, 2, 3, 1).contiguous()


def _image(pixels: Tensor) -> Tensor:
    return pixels.permute(0, 3, 1, 2)


def _empty_image(x: Tensor) -> Tensor:
    """Return an empty channels_last image batch with the shape and type of x."""
    batch, channels, height, width = x.shape
    return _image(x.new_empty((batch, height, width, channels)))


def _empty_statistics(x: Tensor) -> Tensor:
    return x.new_empty((len(x), 2), dtype=torch.promote_types(x.dtype, torch.float32))


def _gradient_of(parameter: Tensor, value: Tensor) -> Tensor:
    """Return a gradient in the parameter's type, contiguous."""
    return value.to(parameter.dtype).contiguous()


def _empty_gradient(parameter: Tensor) -> Tensor:
    return parameter.new_empty(parameter.shape)


def _linear(pixels: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.addmm(bias, pixels.flatten(0, 2), weight.t()).view(*pixels.shape[:3], len(weight))


def _product(grad: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(grad.flatten(0, 2), weight).view(*grad.shape[:3], weight.shape[1])


def can_output_float32(x: Tensor) -> bool:
    """Return whether products of half types can be stored in float32: GPUs accumulate in it, CPUs do not support it."""
    return x.is_cuda


def _weight_gradient(grad: Tensor, pixels: Tensor) -> Tensor:
    """Return the product over all positions, not in float16, in which the sum would overflow."""
    rows, columns = grad.flatten(0, 2).t(), pixels.flatten(0, 2)
    if rows.element_size() < 4 and can_output_float32(rows):
        return torch.mm(rows, columns, out_dtype=torch.float32)
    if rows.dtype is torch.float16:
        rows, columns = rows.float(), columns.float()
    return torch.mm(rows, columns)

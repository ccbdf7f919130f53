"""The block's two branches as torch operators, with gradients, for eager and compiled networks.

Images are [B, C, H, W] and channels_last. They are float32 (or float64, or of the matrix products' type): the residual
stream keeps its type. The mathematics is in this package's docstring.
"""

from typing import Any

import torch
from torch import Tensor

from metaformer.models.kernels.backend import kernels_for
from metaformer.models.kernels.reference import accumulation_type


@torch.library.custom_op("metaformer::statistics", mutates_args=())
def statistics(x: Tensor, eps: float) -> Tensor:
    """Mean and reciprocal deviation of each image, [B, 2]. No gradient: see this package's docstring."""
    return kernels_for(x).statistics(_pixels(x), eps)


@statistics.register_fake
def _(x: Tensor, eps: float) -> Tensor:
    return x.new_empty((len(x), 2), dtype=accumulation_type(x))


@torch.library.custom_op("metaformer::pool_branch", mutates_args=())
def pool_branch(
    x: Tensor, stats: Tensor, scale: Tensor, keep: Tensor | None, size: int, eps: float
) -> tuple[Tensor, Tensor]:
    """The token mixer's branch and residual.

    Args:
        x: images.
        stats: their `statistics`.
        scale: the norm's weight times the layer scale, [C].
        keep: drop path's factor per image, [B].
        size: the window's side, odd.
        eps: of the next norm.

    Returns:
        Images of x's shape and type, and their statistics.
    """
    y, y_stats = kernels_for(x).mix(_pixels(x), stats, scale, keep, size, eps)
    return _image(y), y_stats


@pool_branch.register_fake
def _(x: Tensor, stats: Tensor, scale: Tensor, keep: Tensor | None, size: int, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(stats)


@torch.library.custom_op("metaformer::pool_branch_backward", mutates_args=())
def pool_branch_backward(
    grad: Tensor, x: Tensor, stats: Tensor, scale: Tensor, keep: Tensor | None, size: int
) -> tuple[Tensor, Tensor]:
    """Gradients of `pool_branch` for x and scale."""
    grad_x, grad_scale = kernels_for(x).mix_backward(_pixels(grad), _pixels(x), stats, scale, keep, size)
    return _image(grad_x), grad_scale


@pool_branch_backward.register_fake
def _(grad: Tensor, x: Tensor, stats: Tensor, scale: Tensor, keep: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(scale)


def _save_for_pool(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, stats, scale, keep, ctx.size, _ = inputs
    ctx.save_for_backward(x, stats, scale, keep)


def _pool_gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The channel MLP's branch and residual.

    Args:
        x: images.
        stats: their `statistics`.
        norm: weight and bias, [C] each.
        mlp: weights and biases of both layers: [4C, C], [4C], [C, 4C], [C].
        scale: layer scale, [C].
        keep: drop path's factor per image, [B].
        eps: of the next norm.
        dtype: of the matrix products.

    Returns:
        Images of x's shape and type, their statistics, and what the backward needs: the normalised pixels, and the
        hidden layer before its activation, which is cheaper to compute again than to keep.
    """
    kernels = kernels_for(x)
    fc1, bias1, fc2, bias2 = (tensor.to(dtype) for tensor in mlp)
    pixels = _pixels(x)
    normed = kernels.normalize(pixels, stats, *norm, dtype)
    hidden = _linear(normed, fc1, bias1)
    branch = _linear(kernels.gelu(hidden), fc2, bias2)
    y, y_stats = kernels.residual(pixels, branch, scale, keep, eps)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, channels, height, width = x.shape
    normed = x.new_empty((batch, height, width, channels), dtype=dtype)
    hidden = x.new_empty((batch, height, width, len(mlp[0])), dtype=dtype)
    return torch.empty_like(x), torch.empty_like(stats), normed, hidden


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
) -> list[Tensor]:
    """Gradients of `mlp_branch` for x, the norm's weight and bias, the four tensors of `mlp`, and scale."""
    kernels = kernels_for(x)
    normed, hidden = saved
    dtype, acc = hidden.dtype, stats.dtype
    fc1, fc2, bias2 = mlp[0], mlp[2], mlp[3]
    level = None
    if dtype is torch.float16:  # layer scale, 1e-6 at first, times a weight is nothing there: its size waits
        level = scale.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    pixels = _pixels(grad)
    kept, kept_sum = kernels.residual_backward(pixels, keep, dtype)
    relative_scale = scale if level is None else scale / level
    grad_activated = _product(kept, (relative_scale[:, None] * fc2).to(dtype))
    grad_hidden, activated, grad_bias1 = kernels.gelu_backward(grad_activated, hidden, level)
    correlation = _weight_gradient(activated, kept).t().to(acc)  # on a CPU a tenth faster than the other order
    grad_fc1 = _weight_gradient(grad_hidden, normed).to(fc1.dtype)
    grad_normed = _product(grad_hidden, fc1.to(dtype))
    grad_x, grad_weight, grad_bias = kernels.normalize_backward(grad_normed, _pixels(x), stats, norm_weight, pixels)
    grad_scale = torch.linalg.vecdot(correlation, fc2) + bias2 * kept_sum
    grad_fc2 = correlation * scale[:, None]
    return [_image(grad_x), grad_weight, grad_bias, grad_fc1, grad_bias1, grad_fc2, scale * kept_sum, grad_scale]


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
) -> list[Tensor]:
    like = [x, norm_weight, norm_weight, *mlp, scale]
    return [torch.empty_like(tensor) for tensor in like]


def _save_for_mlp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, stats, norm, mlp, scale, keep, _, _ = inputs
    ctx.save_for_backward(x, stats, norm[0], *mlp, scale, keep, *output[2:])


def _mlp_gradients(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    x, stats, norm_weight, fc1, bias1, fc2, bias2, scale, keep, *saved = ctx.saved_tensors
    grads = mlp_branch_backward(grad, x, stats, norm_weight, [fc1, bias1, fc2, bias2], scale, keep, saved)
    return grads[0], None, grads[1:3], grads[3:7], grads[7], None, None, None


mlp_branch.register_autograd(_mlp_gradients, setup_context=_save_for_mlp)


def _pixels(image: Tensor) -> Tensor:
    """[B, C, H, W] to contiguous [B, H, W, C]: no copy where it is channels_last."""
    return image.permute(0, 2, 3, 1).contiguous()


def _image(pixels: Tensor) -> Tensor:
    return pixels.permute(0, 3, 1, 2)


def _linear(pixels: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.addmm(bias, pixels.flatten(0, 2), weight.t()).view(*pixels.shape[:3], len(weight))


def _product(grad: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(grad.flatten(0, 2), weight).view(*grad.shape[:3], weight.shape[1])


def _weight_gradient(grad: Tensor, pixels: Tensor) -> Tensor:
    return torch.mm(grad.flatten(0, 2).t(), pixels.flatten(0, 2))

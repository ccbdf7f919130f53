"""A block, or its branches, as differentiable torch operators, for eager and compiled networks.

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
    """The parameters of a block: matrices [4C, C] and [C, 4C], bias1 [4C], and all others [C].

    Those from norm2_weight on are of the MLP branch.
    """

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


MIXER_PARAMETERS, MLP_PARAMETERS = 3, 7


class _Layers(NamedTuple):
    """The layers of an MLP in the products' type, with the norm and the layer scale folded in."""

    fc1: Tensor
    bias1: Tensor
    row_sums: Tensor
    fc2: Tensor
    bias2: Tensor
    magnitude: Tensor


class _Mlp(NamedTuple):
    """An MLP branch without its input: the options are those of `block`, and eps is of the norm after the branch."""

    layers: _Layers
    keep: Tensor | None
    residual_scale: list[Tensor]
    activation: str
    eps: float
    out: torch.dtype


RECOMPUTED_CHANNELS = 64  # up to which one kernel for the MLP is predicted to be faster (docs/performance.md)
SAVED_OF_MLP = 3 + len(_Layers._fields)  # the tensors of an MLP branch that its backward pass needs


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
    residual_scales: list[Tensor],
    size: int,
    activation: str,
    eps2: float,
    following_eps: float,
    dtype: torch.dtype,
    stream: torch.dtype,
    out: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute a block.

    Args:
        x: images.
        stats: the `statistics` of x.
        parameters: those of `Parameters`.
        keep: drop path's factors per image in both branches, [2, B], or None.
        residual_scales: factors of the input in the sums of both branches, [C] each, or none.
        size: side of the pooling window, odd.
        activation: "gelu" or "squared_relu".
        eps2: epsilon of norm2.
        following_eps: epsilon of the norm after the block.
        dtype: type of the matrix products.
        stream: type of the images between both branches.
        out: type of the returned images.

    Returns:
        Images with the shape of x, their statistics, and tensors for the backward pass: statistics between the
        branches, the mixer's scale, the normalised pixels, the hidden layer before and after its activation, and the
        MLP's layers. Keeping the activated layer saves writing it again in the backward pass. Both are empty if the
        backward pass computes them again (`_recomputes_hidden`).
    """
    kernels, p = triton_kernels(), _contiguous(parameters)
    keep1, keep2 = (None, None) if keep is None else keep
    scale, layers = _fold(kernels, p, dtype)
    y, y_stats = kernels.mix(_pixels(x), stats, scale, keep1, size, eps2, stream, *residual_scales[:1])
    mlp = _Mlp(layers, keep2, residual_scales[1:], activation, following_eps, out)
    z, z_stats, *saved = _normalize_and_add_mlp(kernels, y, y_stats, mlp)
    return _image(z), z_stats, y_stats, scale, *saved, *layers  # type: ignore[return-value]


@block.register_fake
def _(x: Tensor, stats: Tensor, parameters: list[Tensor], *others: Any) -> tuple[Tensor, ...]:
    *_, dtype, _, out = others
    z_stats, y_stats, scale = _empty_statistics(x), _empty_statistics(x), stats.new_empty(x.shape[1])
    recomputed = _recomputes_hidden(x.shape[1], dtype)
    return _empty_image(x, out), z_stats, y_stats, scale, *_empty_mlp(x, len(parameters[5]), dtype, recomputed)


@torch.library.custom_op("metaformer::block_backward", mutates_args=())
def block_backward(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    parameters: list[Tensor],
    keep: Tensor | None,
    residual_scales: list[Tensor],
    saved: list[Tensor],
    size: int,
    activation: str,
    stream: torch.dtype,
) -> list[Tensor]:
    """Return the gradients of `block` for x, the parameters and the residual scales."""
    kernels, p = triton_kernels(), _contiguous(parameters)
    y_stats, scale, *of_mlp = saved
    keep1, keep2 = (None, None) if keep is None else keep
    pixels, grad = _pixels(x), _pixels(grad)
    mlp = _backward_through_mlp(kernels, grad, keep2, of_mlp, activation)
    grad_y, products, *grad_scale2 = kernels.normalize_backward(
        mlp.normed, of_mlp[0], y_stats, mlp.norm_sums, grad, pixels, size, stream, *residual_scales[1:]
    )
    slopes, sums = kernels.finish_sums(
        products, mlp.branch_sums, mlp.hidden_sums, stats, scale, keep1, pixels[0].numel()
    )
    mixer = stats, scale, keep1, slopes, size
    grad_x, *grad_scale1 = kernels.mix_backward(grad_y, pixels, *mixer, *residual_scales[:1])
    grads = _parameter_gradients(kernels, p, mlp, sums.sum(0))
    return [_image(grad_x), *grads, *_in_types_of(residual_scales, [*grad_scale1, *grad_scale2])]


@block_backward.register_fake
def _(
    grad: Tensor, x: Tensor, stats: Tensor, parameters: list[Tensor], keep: Any, residual_scales: list[Tensor], *_: Any
) -> list[Tensor]:
    return _empty_gradients(x, [*parameters, *residual_scales])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, stats, parameters, keep, residual_scales, ctx.size, ctx.activation, *_, ctx.stream, _ = inputs
    ctx.save_for_backward(x, stats, keep, *parameters, *output[2:], *residual_scales)
    _only_first_has_gradient(ctx, output)


def _gradients(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    count, saved = len(Parameters._fields), 2 + SAVED_OF_MLP
    x, stats, keep, *others = ctx.saved_tensors
    parameters, saved_tensors, scales = others[:count], others[count : count + saved], others[count + saved :]
    if grad is None:
        return None, None, [None] * count, None, [None] * len(scales), *[None] * 7
    with torch.autocast(grad.device.type, enabled=False):  # the user may call backward under autocast
        grad_x, *grads = block_backward(
            grad, x, stats, parameters, keep, scales, saved_tensors, ctx.size, ctx.activation, ctx.stream
        )
    return grad_x, None, grads[:count], None, grads[count:], *[None] * 7


block.register_autograd(_gradients, setup_context=_save)


@torch.library.custom_op("metaformer::identity_branch", mutates_args=())
def identity_branch(
    x: Tensor, stats: Tensor, norm: list[Tensor], keep: Tensor | None, residual_scale: list[Tensor], eps: float
) -> tuple[Tensor, Tensor]:
    """Compute the token mixer branch without a mixer, which is the norm alone, and add it to its input.

    Args:
        x: images.
        stats: the `statistics` of x.
        norm: weight and bias of the norm, times the layer scale, [C] each.
        keep: drop path's factor per image, [B], or None.
        residual_scale: factor of the input in the sum, [C], or none.
        eps: epsilon of the next norm.

    Returns:
        Images with the shape and type of x, and their statistics.
    """
    y, y_stats = triton_kernels().add_norm(_pixels(x), stats, *norm, keep, _only(residual_scale), eps)
    return _image(y), y_stats


@identity_branch.register_fake
def _(
    x: Tensor, stats: Tensor, norm: list[Tensor], keep: Tensor | None, residual_scale: list[Tensor], eps: float
) -> tuple[Tensor, Tensor]:
    return _empty_image(x, x.dtype), _empty_statistics(x)


@torch.library.custom_op("metaformer::identity_branch_backward", mutates_args=())
def identity_branch_backward(
    grad: Tensor, x: Tensor, stats: Tensor, weight: Tensor, keep: Tensor | None, residual_scale: list[Tensor]
) -> list[Tensor]:
    """Return the gradients of `identity_branch` for x, weight and bias, and the residual scale."""
    grad_x, *grads = triton_kernels().add_norm_backward(
        _pixels(grad), _pixels(x), stats, weight, keep, _only(residual_scale)
    )
    return [_image(grad_x), *_in_types_of([weight, weight, *residual_scale], grads)]


@identity_branch_backward.register_fake
def _(
    grad: Tensor, x: Tensor, stats: Tensor, weight: Tensor, keep: Tensor | None, residual_scale: list[Tensor]
) -> list[Tensor]:
    return _empty_gradients(x, [weight, weight, *residual_scale])


def _save_for_identity(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, stats, norm, keep, residual_scale, _ = inputs
    ctx.save_for_backward(x, stats, norm[0], keep, *residual_scale)
    _only_first_has_gradient(ctx, output)


def _identity_gradients(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    x, stats, weight, keep, *residual_scale = ctx.saved_tensors
    if grad is None:
        return None, None, [None] * 2, None, [None] * len(residual_scale), None
    with torch.autocast(grad.device.type, enabled=False):
        grad_x, *grads = identity_branch_backward(grad, x, stats, weight, keep, residual_scale)
    return grad_x, None, grads[:2], None, grads[2:], None


identity_branch.register_autograd(_identity_gradients, setup_context=_save_for_identity)


@torch.library.custom_op("metaformer::mlp_branch", mutates_args=())
def mlp_branch(
    x: Tensor,
    stats: Tensor | None,
    parameters: list[Tensor],
    keep: Tensor | None,
    residual_scale: list[Tensor],
    activation: str,
    norm_eps: float,
    following_eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the channel MLP branch and add it to its input.

    Args:
        x: images.
        stats: the `statistics` of x, or None for a norm over the channels of each position.
        parameters: those of `Parameters` from norm2_weight on.
        keep: drop path's factor per image, [B], or None.
        residual_scale: factor of the input in the sum, [C], or none.
        activation: "gelu" or "squared_relu".
        norm_eps: epsilon of a norm over channels.
        following_eps: epsilon of the norm after the block.
        dtype: type of the matrix products.

    Returns:
        Images with the shape and type of x, their statistics, and tensors for the backward pass: the statistics of each
        position for a norm over channels, and those of the MLP as of `block`.
    """
    kernels, pixels = triton_kernels(), _pixels(x)
    _, layers = _fold(kernels, _contiguous(_without_mixer(parameters)), dtype)
    mlp = _Mlp(layers, keep, residual_scale, activation, following_eps, x.dtype)
    if stats is None:
        normed, norm_stats = kernels.normalize_channels(pixels, norm_eps, dtype)
        z, z_stats, *saved = _add_mlp(kernels, pixels, normed, mlp)
    else:
        norm_stats = layers.magnitude.new_empty(0)
        z, z_stats, *saved = _normalize_and_add_mlp(kernels, pixels, stats, mlp)
    return _image(z), z_stats, norm_stats, *saved, *layers  # type: ignore[return-value]


@mlp_branch.register_fake
def _(x: Tensor, stats: Tensor | None, parameters: list[Tensor], *others: Any) -> tuple[Tensor, ...]:
    batch, _, height, width = x.shape
    z_stats = _empty_statistics(x)
    norm_stats = z_stats.new_empty((batch, height, width, 2) if stats is None else 0)
    dtype = others[-1]
    recomputed = stats is not None and _recomputes_hidden(x.shape[1], dtype)
    return _empty_image(x, x.dtype), z_stats, norm_stats, *_empty_mlp(x, len(parameters[2]), dtype, recomputed)


@torch.library.custom_op("metaformer::mlp_branch_backward", mutates_args=())
def mlp_branch_backward(
    grad: Tensor,
    stats: Tensor,
    parameters: list[Tensor],
    keep: Tensor | None,
    residual_scale: list[Tensor],
    saved: list[Tensor],
    activation: str,
) -> list[Tensor]:
    """Return the gradients of `mlp_branch` for x, the parameters and the residual scale.

    `stats` are the statistics of each image, or those of each position.
    """
    kernels, p, grad = triton_kernels(), _contiguous(_without_mixer(parameters)), _pixels(grad)
    mlp = _backward_through_mlp(kernels, grad, keep, saved, activation)
    grad_x, *grad_scale = kernels.norm_backward(mlp.normed, saved[0], stats, mlp.norm_sums, grad, _only(residual_scale))
    # as `finish_sums` makes them, without a mixer's
    parts = torch.zeros_like(p.scale2, dtype=stats.dtype), mlp.branch_sums.sum((0, 1)), mlp.hidden_sums.sum((0, 1))
    grads = _parameter_gradients(kernels, p, mlp, torch.cat(parts))[MIXER_PARAMETERS:]
    return [_image(grad_x), *grads, *_in_types_of(residual_scale, grad_scale)]


@mlp_branch_backward.register_fake
def _(
    grad: Tensor, stats: Tensor, parameters: list[Tensor], keep: Any, residual_scale: list[Tensor], *_: Any
) -> list[Tensor]:
    return _empty_gradients(grad, [*parameters, *residual_scale])


def _save_for_mlp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, stats, parameters, keep, residual_scale, ctx.activation, *_ = inputs
    norm_stats, *saved = output[2:]
    ctx.save_for_backward(norm_stats if stats is None else stats, keep, *parameters, *saved, *residual_scale)
    _only_first_has_gradient(ctx, output)


def _mlp_gradients(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    count, saved = MLP_PARAMETERS, SAVED_OF_MLP
    stats, keep, *others = ctx.saved_tensors
    parameters, saved_tensors, residual_scale = others[:count], others[count : count + saved], others[count + saved :]
    if grad is None:
        return None, None, [None] * count, None, [None] * len(residual_scale), *[None] * 4
    with torch.autocast(grad.device.type, enabled=False):
        grad_x, *grads = mlp_branch_backward(
            grad, stats, parameters, keep, residual_scale, saved_tensors, ctx.activation
        )
    return grad_x, None, grads[:count], None, grads[count:], *[None] * 4


mlp_branch.register_autograd(_mlp_gradients, setup_context=_save_for_mlp)


class _MlpGradient(NamedTuple):
    """Gradients within an MLP branch: that of the normalised pixels, sums, and the matrices' before they are scaled.

    The sums are parts of those that `gelu_backward` and `residual_backward` return.
    """

    normed: Tensor
    norm_sums: Tensor
    branch_sums: Tensor
    hidden_sums: Tensor
    correlation1: Tensor
    correlation2: Tensor


def _without_mixer(mlp: list[Tensor]) -> list[Tensor]:
    """Return the parameters of a block whose mixer's are not used, so any of the same shape do."""
    return [*mlp[:2], mlp[-1], *mlp]


def _contiguous(parameters: list[Tensor]) -> Parameters:
    return Parameters(*(parameter.contiguous() for parameter in parameters))


def _fold(kernels: Kernels, p: Parameters, dtype: torch.dtype) -> tuple[Tensor, _Layers]:
    """Return the mixer's scale, and the MLP's layers in `dtype`."""
    norms = p.norm2_weight, p.norm2_bias, p.norm1_weight, p.scale1
    fc1, bias1, row_sums, scale = kernels.fold_norms(p.fc1, p.bias1, *norms, dtype)
    return scale, _Layers(fc1, bias1, row_sums, *kernels.scale_rows(p.fc2, p.bias2, p.scale2, dtype))


def _recomputes_hidden(channels: int, dtype: torch.dtype) -> bool:
    """Return whether one kernel computes an MLP after a norm over the image, and its backward pass the hidden layer.

    float32 products are left to torch, whose TF32 setting they follow. Other widths would need more registers.
    """
    return dtype.itemsize < 4 and channels <= RECOMPUTED_CHANNELS and channels % 16 == 0


def _normalize_and_add_mlp(
    kernels: Kernels, x: Tensor, stats: Tensor, mlp: _Mlp
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return what `_add_mlp` returns for x normalised; the hidden layer is empty if the backward pass recomputes it."""
    layers, dtype = mlp.layers, mlp.layers.fc1.dtype
    if not _recomputes_hidden(x.shape[3], dtype):
        return _add_mlp(kernels, x, kernels.normalize(x, stats, dtype), mlp)
    of_layers = layers.fc1, layers.bias1, layers.fc2, layers.bias2, layers.magnitude
    options = mlp.keep, mlp.activation, mlp.eps, mlp.out
    normed, z, z_stats = kernels.mlp(x, stats, *of_layers, *options, *mlp.residual_scale)
    return z, z_stats, normed, normed.new_empty(0), normed.new_empty(0)


def _add_mlp(kernels: Kernels, x: Tensor, normed: Tensor, mlp: _Mlp) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return x plus its MLP branch, its statistics, `normed`, and the hidden layer before and after its activation."""
    layers = mlp.layers
    hidden = _linear(normed, layers.fc1, layers.bias1)
    activated = _activation(kernels, mlp.activation)[0](hidden)
    branch = _linear(activated, layers.fc2, layers.bias2)
    z, z_stats = kernels.residual(x, branch, layers.magnitude, mlp.keep, mlp.eps, mlp.out, *mlp.residual_scale)
    return z, z_stats, normed, hidden, activated


def _backward_through_mlp(
    kernels: Kernels, grad: Tensor, keep: Tensor | None, saved: list[Tensor], activation: str
) -> _MlpGradient:
    normed, hidden, activated, *others = saved
    layers = _Layers(*others)
    branch_grad, branch_sums = kernels.residual_backward(grad, keep, normed.dtype)
    if hidden.ndim == 1:  # it was not kept
        of_layers = layers.fc1, layers.bias1, layers.row_sums, layers.fc2, layers.magnitude
        grad_hidden, activated, hidden_sums, norm_sums = kernels.mlp_backward(
            branch_grad, normed, *of_layers, activation
        )
    else:
        grad_hidden, hidden_sums, norm_sums = _activation(kernels, activation)[1](
            _product(branch_grad, layers.fc2), hidden, layers.magnitude, layers.bias1, layers.row_sums
        )
    correlations = _correlation(grad_hidden, normed), _correlation(branch_grad, activated)
    return _MlpGradient(_product(grad_hidden, layers.fc1), norm_sums, branch_sums, hidden_sums, *correlations)


def _parameter_gradients(kernels: Kernels, p: Parameters, mlp: _MlpGradient, sums: Tensor) -> list[Tensor]:
    """Return the gradients of `Parameters`; `sums` are those of `finish_sums`, of all images."""
    norms = p.norm2_weight, p.norm2_bias, p.norm1_weight, p.scale1
    grads1 = kernels.fc1_gradients(mlp.correlation1, p.fc1, *norms, sums)
    return [*grads1, *kernels.fc2_gradients(mlp.correlation2, p.fc2, p.bias2, p.scale2, sums)]


def _empty_mlp(x: Tensor, columns: int, dtype: torch.dtype, recomputed: bool) -> list[Tensor]:
    """Return the empty tensors that an MLP saves: normalised pixels, hidden layer, activated one, and layers."""
    batch, channels, height, width = x.shape
    exact = torch.promote_types(x.dtype, torch.float32)

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return x.new_empty(shape, dtype=dtype)

    hidden = (0,) if recomputed else (batch, height, width, columns)
    images = empty(batch, height, width, channels), empty(*hidden), empty(*hidden)
    layer1 = empty(columns, channels), empty(columns), empty(columns, dtype=exact)
    layer2 = empty(channels, columns), empty(channels), empty(1, dtype=exact)
    return [*images, *_Layers(*layer1, *layer2)]


def _only_first_has_gradient(ctx: Any, output: tuple[Tensor, ...]) -> None:
    """Give the other outputs no gradient, for which autograd would otherwise allocate zeros of their size."""
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _only(tensors: list[Tensor]) -> Tensor | None:
    """Return the only tensor of a list, or None if it is empty: an argument of an operator that has a gradient."""
    return tensors[0] if tensors else None


def _in_types_of(parameters: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    return [grad.to(parameter.dtype) for parameter, grad in zip(parameters, grads, strict=True)]


def _empty_gradients(x: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    return [_empty_image(x, x.dtype), *(parameter.new_empty(parameter.shape) for parameter in parameters)]


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

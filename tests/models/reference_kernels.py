"""The kernels' functions in plain torch: the reference for the Triton kernels, with which operators run on CPUs, too.

All tensors are contiguous [B, H, W, C]. Statistics, factors and sums have the accumulation type: float32, or float64
for float64 input. `keep` is drop path's factor per image, or None where nothing is dropped.
"""

import torch
from torch import Tensor
from torch.nn import functional

from metaformer.models.kernels.backend import Kernels


def accumulation_type(x: Tensor) -> torch.dtype:
    """Return the type in which sums over `x` are accumulated."""
    return torch.promote_types(x.dtype, torch.float32)


def statistics(x: Tensor, eps: float) -> Tensor:
    """Return mean and 1 / sqrt(variance + eps) of each image over all its values, [B, 2]."""
    values = x.flatten(1).to(accumulation_type(x))
    variance, mean = torch.var_mean(values, 1, correction=0)
    return torch.stack([mean, (variance + eps).rsqrt()], 1)


def normalize(x: Tensor, stats: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (x - mean) * rstd in `dtype`."""
    return ((x - _per_image(stats[:, 0])) * _per_image(stats[:, 1])).to(dtype)


def mix(
    x: Tensor, stats: Tensor, scale: Tensor, keep: Tensor | None, size: int, eps: float, dtype: torch.dtype,
    residual_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return y = residual_scale * x + keep * scale * rstd * (pool(x) - x) in `dtype`, and the statistics of y."""
    difference = _pool(x, size).sub_(x)
    identity = x if residual_scale is None else x * residual_scale
    y = torch.addcmul(identity, difference, _broadcast(_branch_factor(stats, scale, keep))).to(dtype)
    return y, statistics(y, eps)


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
    """Return the gradient of y, parts of the mixer's sums S, and the gradient of residual_scale if there is one."""
    shift, slope = (sums.sum(1) / x[0].numel()).unbind(1)
    residual = residual_grad if residual_scale is None else residual_grad * residual_scale
    grad_y = (grad - _per_image(shift) - normed * _per_image(slope)) * _per_image(stats[:, 1]) + residual
    grad_y = grad_y.to(dtype)
    products = (grad_y * _pool(x, size).sub_(x)).sum((1, 2))[:, None]
    if residual_scale is None:
        return grad_y, products
    y = normed / _per_image(stats[:, 1]) + _per_image(stats[:, 0])
    return grad_y, products, (residual_grad * y).sum((0, 1, 2))


def finish_sums(
    products: Tensor,
    branch_sums: Tensor,
    hidden_sums: Tensor,
    stats: Tensor,
    scale: Tensor,
    keep: Tensor | None,
    count: int,
) -> tuple[Tensor, Tensor]:
    """Sum the parts of each image."""
    rstd = stats[:, 1]
    grad_scale = products.sum(1) * (rstd if keep is None else rstd * keep)[:, None]
    slopes = -(grad_scale @ scale) * rstd**2 / count
    return slopes, torch.cat([grad_scale, branch_sums.sum(1), hidden_sums.sum(1)], 1)


def mix_backward(
    grad: Tensor, x: Tensor, stats: Tensor, scale: Tensor, keep: Tensor | None, slopes: Tensor, size: int,
    residual_scale: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return the gradient of `mix` for x, including the part through the statistics, and for residual_scale if any."""
    transposed = _pool_transposed(grad, size).sub_(grad)
    residual = grad if residual_scale is None else grad * residual_scale
    grad_x = torch.addcmul(residual, transposed, _broadcast(_branch_factor(stats, scale, keep)))
    grad_x = (grad_x + (x - _per_image(stats[:, 0])) * _per_image(slopes)).to(x.dtype)
    return (grad_x,) if residual_scale is None else (grad_x, (grad * x).to(stats.dtype).sum((0, 1, 2)))


def fold_norms(
    fc1: Tensor,
    bias1: Tensor,
    weight: Tensor,
    bias: Tensor,
    mixer_weight: Tensor,
    mixer_scale: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the MLP's first layer in `dtype` with norm2 folded in, and the mixer's `scale`."""
    acc = accumulation_type(fc1)
    fc1, folded = fc1.to(acc), (fc1.to(acc) * weight).to(dtype)
    bias1 = (bias1 + fc1 @ bias.to(acc)).to(dtype)
    return folded, bias1, folded.sum(1, dtype=acc), mixer_weight.to(acc) * mixer_scale


def scale_rows(fc2: Tensor, bias2: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return the MLP's second layer in `dtype`, with its layer scale folded in but for its size, and that size."""
    scale = scale.to(accumulation_type(scale))
    magnitude = scale.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    relative = scale / magnitude
    return (relative[:, None] * fc2).to(dtype), (relative * bias2).to(dtype), magnitude[None]


def fc1_gradients(
    correlation: Tensor,
    fc1: Tensor,
    weight: Tensor,
    bias: Tensor,
    mixer_weight: Tensor,
    mixer_scale: Tensor,
    sums: Tensor,
) -> tuple[Tensor, ...]:
    """Return the gradients of norm1, the mixer's layer scale, norm2 and the MLP's first layer."""
    channels = len(weight)
    grad_scale, grad_bias1 = sums[:channels], sums[2 * channels :]
    grad_fc1 = correlation * weight + grad_bias1[:, None] * bias
    grad_weight, grad_bias = (fc1 * correlation).sum(0), grad_bias1 @ fc1.to(sums.dtype)
    grads = [grad_scale * mixer_scale, torch.zeros_like(weight), grad_scale * mixer_weight, grad_weight, grad_bias]
    parameters = [mixer_weight, mixer_weight, mixer_scale, weight, bias, fc1, fc1]
    return tuple(
        value.to(p.dtype, copy=True) for p, value in zip(parameters, [*grads, grad_fc1, grad_bias1], strict=True)
    )


def fc2_gradients(
    correlation: Tensor, fc2: Tensor, bias2: Tensor, scale: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the MLP's second layer and its layer scale."""
    branch_sum = sums[len(scale) : 2 * len(scale)]
    grad_scale = (correlation * fc2).sum(1) + bias2 * branch_sum
    grads = (correlation * scale[:, None], scale * branch_sum, grad_scale)
    grad_fc2, grad_bias2, grad_scale = (value.to(fc2.dtype).contiguous() for value in grads)
    return grad_fc2, grad_bias2, grad_scale


def gelu(hidden: Tensor) -> Tensor:
    """Return x * Phi(x), computed with the error function."""
    return functional.gelu(hidden)


def gelu_backward(
    grad: Tensor, hidden: Tensor, factor: Tensor, bias: Tensor, row_sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient for `hidden`, and parts of the sums of the gradient that others need."""
    torch.ops.aten.gelu_backward.grad_input(grad, hidden, grad_input=grad)
    grad.mul_(factor)
    return grad, *_sums_of_gradient(grad, hidden, bias, row_sums)


def squared_relu(hidden: Tensor) -> Tensor:
    """Return relu(x)^2."""
    return functional.relu(hidden).square_()


def squared_relu_backward(
    grad: Tensor, hidden: Tensor, factor: Tensor, bias: Tensor, row_sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `gelu_backward` returns, for relu(hidden)^2."""
    grad.mul_(functional.relu(hidden)).mul_(2 * factor)
    return grad, *_sums_of_gradient(grad, hidden, bias, row_sums)


def _sums_of_gradient(grad: Tensor, hidden: Tensor, bias: Tensor, row_sums: Tensor) -> tuple[Tensor, Tensor]:
    total = grad.sum((1, 2), dtype=accumulation_type(grad))
    products = _dot(grad, hidden.to(total.dtype) - bias, total.dtype).sum(1)
    return total[:, None], torch.stack([total @ row_sums, products], 1)[:, None]


def residual(
    x: Tensor, branch: Tensor, factor: Tensor, keep: Tensor | None, eps: float, dtype: torch.dtype,
    residual_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return y = residual_scale * x + keep * factor * branch in `dtype`, and the statistics of y; `factor` is [1]."""
    identity = x if residual_scale is None else x * residual_scale
    y = torch.addcmul(identity, branch, _per_image(factor if keep is None else keep * factor)).to(dtype)
    return y, statistics(y, eps)


def residual_backward(grad: Tensor, keep: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return keep * grad in `dtype`, and parts of its sums over each image's positions, [B, parts, C]."""
    branch_grad = (grad if keep is None else grad * _per_image(keep)).to(dtype)
    return branch_grad, branch_grad.sum((1, 2), dtype=accumulation_type(grad))[:, None]


def normalize_channels(x: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return (x - mean) * rstd in `dtype` with the statistics of each position's channels, and these, [B, H, W, 2]."""
    values = x.to(accumulation_type(x))
    variance, mean = torch.var_mean(values, 3, correction=0, keepdim=True)
    rstd = (variance + eps).rsqrt()
    return ((values - mean) * rstd).to(dtype), torch.cat([mean, rstd], 3)


def norm_backward(
    grad: Tensor, normed: Tensor, stats: Tensor, sums: Tensor, residual_grad: Tensor, residual_scale: Tensor | None
) -> tuple[Tensor, ...]:
    """Return the gradient of a norm's input, and that of the residual scale if there is one."""
    if stats.ndim == 2:
        mean, rstd = (_per_image(each) for each in stats.unbind(1))
        shift, slope = (_per_image(each) for each in (sums.sum(1) / normed[0].numel()).unbind(1))
    else:
        mean, rstd = stats.split(1, 3)
        shift, slope = grad.mean(3, True, dtype=stats.dtype), (grad.to(stats.dtype) * normed).mean(3, True)
    through_norm = (grad - shift - normed * slope) * rstd
    if residual_scale is None:
        return ((through_norm + residual_grad).to(residual_grad.dtype),)
    grad_x = (through_norm + residual_grad * residual_scale).to(residual_grad.dtype)
    return grad_x, (residual_grad * (normed / rstd + mean)).sum((0, 1, 2))


def add_norm(
    x: Tensor, stats: Tensor, weight: Tensor, bias: Tensor, keep: Tensor | None, residual_scale: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return y = residual_scale * x + keep * (weight * (x - mean) * rstd + bias), and the statistics of y."""
    branch = normalize(x, stats, accumulation_type(x)) * weight + bias
    identity = x if residual_scale is None else x * residual_scale
    y = (identity + (branch if keep is None else branch * _per_image(keep))).to(x.dtype)
    return y, statistics(y, eps)


def add_norm_backward(
    grad: Tensor, x: Tensor, stats: Tensor, weight: Tensor, keep: Tensor | None, residual_scale: Tensor | None
) -> tuple[Tensor, ...]:
    """Return the gradients of `add_norm` for x, weight, bias, and residual_scale if there is one."""
    normed, rstd = normalize(x, stats, stats.dtype), _per_image(stats[:, 1])
    kept = (grad if keep is None else grad * _per_image(keep)).to(stats.dtype)
    scaled = kept * weight
    shift, slope = (_per_image(each.flatten(1).mean(1)) for each in (scaled, scaled * normed))
    through_norm = (scaled - shift - normed * slope) * rstd
    grads = (kept * normed).sum((0, 1, 2)), kept.sum((0, 1, 2))
    if residual_scale is None:
        return (through_norm + grad).to(x.dtype), *grads
    return (through_norm + grad * residual_scale).to(x.dtype), *grads, (grad * x).to(stats.dtype).sum((0, 1, 2))


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
    """Return the normalised pixels, x plus its MLP branch, and the statistics of the sum."""
    acc, normed = accumulation_type(x), normalize(x, stats, fc1.dtype)
    hidden = normed.to(acc) @ fc1.t().to(acc) + bias1
    activated = (gelu(hidden) if activation == "gelu" else squared_relu(hidden)).to(fc1.dtype)
    branch = activated.to(acc) @ fc2.t().to(acc) + bias2
    return normed, *residual(x, branch, factor, keep, eps, dtype, residual_scale)


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
    """Return the gradient of the hidden layer, its activation, and sums."""
    acc, is_gelu = factor.dtype, activation == "gelu"
    hidden = normed.to(acc) @ fc1.t().to(acc) + bias1
    activated = (gelu if is_gelu else squared_relu)(hidden).to(grad.dtype)
    backward = gelu_backward if is_gelu else squared_relu_backward
    grad_hidden, *sums = backward(grad.to(acc) @ fc2.to(acc), hidden, factor, bias1, row_sums)
    return grad_hidden.to(grad.dtype), activated, *sums  # type: ignore[return-value]


def _branch_factor(stats: Tensor, scale: Tensor, keep: Tensor | None) -> Tensor:
    """Return the factor of pool(x) - x, [B, C]."""
    factor = stats[:, 1:] * scale
    return factor if keep is None else factor * keep[:, None]


def _broadcast(factor: Tensor) -> Tensor:
    """Broadcast [B, C] over positions."""
    return factor[:, None, None, :]


def _per_image(factor: Tensor) -> Tensor:
    """Broadcast [B] over positions and channels."""
    return factor[:, None, None, None]


def _dot(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return sums of products over positions, [B, C]."""
    return (a.to(dtype) * b).sum((1, 2))


def _pool(x: Tensor, size: int) -> Tensor:
    """Return the average over each window without its padding, in the accumulation type."""
    return _average_windows(x, size, include_padding=False)


def _pool_transposed(grad: Tensor, size: int) -> Tensor:
    """Apply the transpose of `_pool`, which spreads each position's value evenly over its window."""
    ones = grad.new_ones((1, *grad.shape[1:3], 1), dtype=accumulation_type(grad))
    inside = _average_windows(ones, size, include_padding=True)  # fraction of each window that is in the image
    return _average_windows(grad / inside, size, include_padding=True)


def _average_windows(x: Tensor, size: int, include_padding: bool) -> Tensor:
    image = x.to(accumulation_type(x)).permute(0, 3, 1, 2)
    pooled = functional.avg_pool2d(image, size, 1, size // 2, count_include_pad=include_padding)
    return pooled.permute(0, 2, 3, 1).contiguous()


REFERENCE = Kernels(**{name: globals()[name] for name in Kernels._fields})

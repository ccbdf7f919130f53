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


def normalize(x: Tensor, stats: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (x - mean) * rstd * weight + bias, in `dtype`."""
    factor = stats[:, 1:] * weight  # [B, C]
    return torch.addcmul(_broadcast(bias - stats[:, :1] * factor), x, _broadcast(factor)).to(dtype)


def normalize_backward(
    grad: Tensor, x: Tensor, stats: Tensor, weight: Tensor, residual_grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `normalize` for x, weight and bias; `residual_grad` is added to that for x."""
    mean, rstd = stats[:, :1], stats[:, 1:]
    acc = stats.dtype
    grad_sum = grad.sum((1, 2), dtype=acc)  # [B, C]
    product_sum = (_dot(grad, x, acc) - mean * grad_sum) * rstd  # sum of grad * (x - mean) * rstd
    count = x[0].numel()
    shift = (grad_sum * weight).sum(1, keepdim=True) / count
    slope = (product_sum * weight).sum(1, keepdim=True) / count
    constant = rstd * (slope * rstd * mean - shift)
    grad_x = torch.addcmul(_broadcast(constant), x, _broadcast(-slope * rstd**2))
    grad_x = torch.addcmul(grad_x, grad, _broadcast(rstd * weight)).add_(residual_grad)
    return grad_x.to(x.dtype), product_sum.sum(0), grad_sum.sum(0)


def mix(x: Tensor, stats: Tensor, scale: Tensor, keep: Tensor | None, size: int, eps: float) -> tuple[Tensor, Tensor]:
    """Return y = x + keep * scale * rstd * (pool(x) - x), and the statistics of y."""
    difference = _pool(x, size).sub_(x)
    y = torch.addcmul(x, difference, _broadcast(_branch_factor(stats, scale, keep))).to(x.dtype)
    return y, statistics(y, eps)


def mix_backward(
    grad: Tensor, x: Tensor, stats: Tensor, scale: Tensor, keep: Tensor | None, size: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `mix` for x, including the part through the statistics, and for scale."""
    acc = stats.dtype
    mean, rstd = stats[:, :1], stats[:, 1:]
    transposed = _pool_transposed(grad, size).sub_(grad)
    products = _dot(transposed, x, acc)  # [B, C]
    if keep is not None:
        products = products * keep[:, None]
    slope = -(products * scale).sum(1, keepdim=True) * rstd**3 / x[0].numel()
    grad_x = torch.addcmul(grad, transposed, _broadcast(_branch_factor(stats, scale, keep)))
    grad_x = torch.addcmul(grad_x, x, _broadcast(slope)).sub_(_broadcast(slope * mean))
    return grad_x.to(x.dtype), (products * rstd).sum(0)


def gelu(hidden: Tensor) -> Tensor:
    """Return x * Phi(x), computed with the error function."""
    return functional.gelu(hidden)


def gelu_backward(grad: Tensor, hidden: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient for `hidden` times `factor` (a scalar), gelu(hidden), and the gradient's sum [4C].

    `grad` is overwritten.
    """
    torch.ops.aten.gelu_backward.grad_input(grad, hidden, grad_input=grad)
    if factor is not None:
        grad.mul_(factor)
    total = grad.sum((0, 1, 2), dtype=accumulation_type(grad))
    return grad, gelu(hidden), total


def squared_relu(hidden: Tensor) -> Tensor:
    """Return relu(x)^2."""
    return functional.relu(hidden).square_()


def squared_relu_backward(grad: Tensor, hidden: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient for `hidden` times `factor` (a scalar), relu(hidden)^2, and the gradient's sum [4C].

    `grad` is overwritten.
    """
    positive = functional.relu(hidden)
    grad.mul_(positive).mul_(2 if factor is None else 2 * factor)
    total = grad.sum((0, 1, 2), dtype=accumulation_type(grad))
    return grad, positive.square_(), total


def residual(x: Tensor, branch: Tensor, scale: Tensor, keep: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Return y = x + keep * scale * branch in the type of x, and the statistics of y."""
    factor = scale[None] if keep is None else keep[:, None] * scale
    y = torch.addcmul(x, branch, _broadcast(factor)).to(x.dtype)
    return y, statistics(y, eps)


def residual_backward(grad: Tensor, keep: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return keep * grad in `dtype`, and its sum over images and positions, [C]."""
    branch_grad = (grad if keep is None else grad * keep[:, None, None, None]).to(dtype)
    return branch_grad, branch_grad.sum((0, 1, 2), dtype=accumulation_type(grad))


def _branch_factor(stats: Tensor, scale: Tensor, keep: Tensor | None) -> Tensor:
    """Return the factor of pool(x) - x, [B, C]."""
    factor = stats[:, 1:] * scale
    return factor if keep is None else factor * keep[:, None]


def _broadcast(factor: Tensor) -> Tensor:
    """Broadcast [B, C] over positions."""
    return factor[:, None, None, :]


def _dot(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return sums of products over positions, [B, C]."""
    return (a.to(dtype) * b).sum((1, 2))


def _pool(x: Tensor, size: int) -> Tensor:
    """Return the average over each window without its padding, in the accumulation type."""
    return _average_windows(x, size, include_padding=False)


def _pool_transposed(grad: Tensor, size: int) -> Tensor:
    """Apply the transpose of `_pool`, which spreads each position's value evenly over its window.

    It does not use torch's own backward, which is wrong for this memory format on some GPUs (pytorch issue 188344).
    """
    ones = grad.new_ones((1, *grad.shape[1:3], 1), dtype=accumulation_type(grad))
    inside = _average_windows(ones, size, include_padding=True)  # fraction of each window that is in the image
    return _average_windows(grad / inside, size, include_padding=True)


def _average_windows(x: Tensor, size: int, include_padding: bool) -> Tensor:
    image = x.to(accumulation_type(x)).permute(0, 3, 1, 2)
    pooled = functional.avg_pool2d(image, size, 1, size // 2, count_include_pad=include_padding)
    return pooled.permute(0, 2, 3, 1).contiguous()


REFERENCE = Kernels(
    statistics,
    normalize,
    normalize_backward,
    mix,
    mix_backward,
    gelu,
    gelu_backward,
    squared_relu,
    squared_relu_backward,
    residual,
    residual_backward,
)

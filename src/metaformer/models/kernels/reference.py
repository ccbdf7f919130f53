"""Each kernel in plain torch: what the fused ones are held to, and what runs on CPUs.

All tensors are contiguous [B, H, W, C]; statistics, factors and sums are of the accumulation type (float32, or float64
for float64 input); `keep` is drop path's factor per image, None where nothing is dropped.
"""

import torch
from torch import Tensor
from torch.nn import functional


def accumulation_type(x: Tensor) -> torch.dtype:
    """The type that sums over `x` are made in."""
    return torch.promote_types(x.dtype, torch.float32)


def statistics(x: Tensor, eps: float) -> Tensor:
    """Mean and 1 / sqrt(variance + eps) of each image over all its values: [B, 2]."""
    values = x.flatten(1).to(accumulation_type(x))
    # Writes a result that nobody needs, and yet takes a third of var_mean's time on a CPU (docs/performance.md).
    _, mean, rstd = torch.native_layer_norm(values, values.shape[1:], None, None, eps)
    return torch.cat([mean, rstd], 1)


def normalize(x: Tensor, stats: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """(x - mean) * rstd * weight + bias, in `dtype`."""
    factor = stats[:, 1:] * weight  # [B, C]
    return torch.addcmul(_spread(bias - stats[:, :1] * factor), x, _spread(factor)).to(dtype)


def normalize_backward(
    grad: Tensor, x: Tensor, stats: Tensor, weight: Tensor, other: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `normalize` for x (plus `other`, x's gradient by another way), weight and bias."""
    mean, rstd = stats[:, :1], stats[:, 1:]
    acc = stats.dtype
    plain = grad.sum((1, 2), dtype=acc)  # [B, C]
    with_x = (_dot(grad, x, acc) - mean * plain) * rstd  # of grad * (x - mean) * rstd
    count = x[0].numel()
    shift = (plain * weight).sum(1, keepdim=True) / count
    slope = (with_x * weight).sum(1, keepdim=True) / count
    constant = rstd * (slope * rstd * mean - shift)
    grad_x = torch.addcmul(_spread(constant), x, _spread(-slope * rstd**2))
    grad_x = torch.addcmul(grad_x, grad, _spread(rstd * weight)).add_(other)
    return grad_x.to(x.dtype), with_x.sum(0), plain.sum(0)


def mix(x: Tensor, stats: Tensor, scale: Tensor, keep: Tensor | None, size: int, eps: float) -> tuple[Tensor, Tensor]:
    """The token mixer's branch with its residual, x + keep * scale * rstd * (pool(x) - x), and its statistics."""
    difference = _pool(x, size).sub_(x)
    y = torch.addcmul(x, difference, _spread(_branch_factor(stats, scale, keep))).to(x.dtype)
    return y, statistics(y, eps)


def mix_backward(
    grad: Tensor, x: Tensor, stats: Tensor, scale: Tensor, keep: Tensor | None, size: int
) -> tuple[Tensor, Tensor]:
    """Gradients of `mix` for x, that through the statistics included, and scale."""
    acc = stats.dtype
    mean, rstd = stats[:, :1], stats[:, 1:]
    spread_back = _pool_transposed(grad, size).sub_(grad)
    products = _dot(spread_back, x, acc)  # [B, C]
    if keep is not None:
        products = products * keep[:, None]
    slope = -(products * scale).sum(1, keepdim=True) * rstd**3 / x[0].numel()
    grad_x = torch.addcmul(grad, spread_back, _spread(_branch_factor(stats, scale, keep)))
    grad_x = torch.addcmul(grad_x, x, _spread(slope)).sub_(_spread(slope * mean))
    return grad_x.to(x.dtype), (products * rstd).sum(0)


def gelu(hidden: Tensor) -> Tensor:
    """x * Phi(x), with the error function."""
    return functional.gelu(hidden)


def gelu_backward(grad: Tensor, hidden: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """For gelu's gradient times `factor` (one number): hidden's gradient, gelu(hidden), the gradient's sum [4C].

    Overwrites `grad`.
    """
    torch.ops.aten.gelu_backward.grad_input(grad, hidden, grad_input=grad)
    if factor is not None:
        grad.mul_(factor)
    total = grad.sum((0, 1, 2), dtype=accumulation_type(grad))
    return grad, gelu(hidden), total


def residual(x: Tensor, branch: Tensor, scale: Tensor, keep: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """x + keep * scale * branch, in x's type, and its statistics."""
    factor = scale[None] if keep is None else keep[:, None] * scale
    y = torch.addcmul(x, branch, _spread(factor)).to(x.dtype)
    return y, statistics(y, eps)


def residual_backward(grad: Tensor, keep: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """keep * grad in `dtype`, and its sum over images and positions, [C]."""
    kept = (grad if keep is None else grad * keep[:, None, None, None]).to(dtype)
    return kept, kept.sum((0, 1, 2), dtype=accumulation_type(grad))


def _branch_factor(stats: Tensor, scale: Tensor, keep: Tensor | None) -> Tensor:
    """What the mixer's difference is multiplied by, [B, C]."""
    factor = stats[:, 1:] * scale
    return factor if keep is None else factor * keep[:, None]


def _spread(factor: Tensor) -> Tensor:
    """[B, C] over positions."""
    return factor[:, None, None, :]


def _dot(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums of products over positions: [B, C]."""
    return (a.to(dtype) * b).sum((1, 2))


def _pool(x: Tensor, size: int) -> Tensor:
    """The average over a window, without its padding, in the accumulation type."""
    return _windows(x, size, include_padding=False)


def _pool_transposed(grad: Tensor, size: int) -> Tensor:
    """The transposed map of `_pool`: each position gives its window equal parts.

    Not by torch's own backward, which is wrong for this memory format on some GPUs (pytorch issue 188344).
    """
    ones = grad.new_ones((1, *grad.shape[1:3], 1), dtype=accumulation_type(grad))
    share = _windows(ones, size, include_padding=True)  # of a window's area that lies in the image
    return _windows(grad / share, size, include_padding=True)


def _windows(x: Tensor, size: int, include_padding: bool) -> Tensor:
    image = x.to(accumulation_type(x)).permute(0, 3, 1, 2)
    pooled = functional.avg_pool2d(image, size, 1, size // 2, count_include_pad=include_padding)
    return pooled.permute(0, 2, 3, 1).contiguous()

"""The Triton kernels as one set, which is imported when it is first used."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from torch import Tensor


class Kernels(NamedTuple):
    """The kernels of the operators.

    All tensors are contiguous [B, H, W, C]. Statistics, factors and sums are float32. `keep` is drop path's factor per
    image, or None where nothing is dropped.
    """

    statistics: Callable[..., Tensor]
    normalize: Callable[..., Tensor]
    normalize_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    mix: Callable[..., tuple[Tensor, Tensor]]
    mix_backward: Callable[..., tuple[Tensor, Tensor]]
    gelu: Callable[..., Tensor]
    gelu_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    squared_relu: Callable[..., Tensor]
    squared_relu_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    residual: Callable[..., tuple[Tensor, Tensor]]
    residual_backward: Callable[..., tuple[Tensor, Tensor]]


@cache
def triton_kernels() -> Kernels:
    """Import and return the Triton kernels; torch's CPU builds do not include triton."""
    from metaformer.models.kernels import triton_elementwise, triton_mixer, triton_norm

    return Kernels(
        triton_norm.statistics,
        triton_norm.normalize,
        triton_norm.normalize_backward,
        triton_mixer.mix,
        triton_mixer.mix_backward,
        triton_elementwise.gelu,
        triton_elementwise.gelu_backward,
        triton_elementwise.squared_relu,
        triton_elementwise.squared_relu_backward,
        triton_elementwise.residual,
        triton_elementwise.residual_backward,
    )

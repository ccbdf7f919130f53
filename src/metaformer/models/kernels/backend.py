"""Selection of the kernels for a tensor's device."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from torch import Tensor

from metaformer.models.kernels import reference


class Kernels(NamedTuple):
    """The functions of `reference`, or replacements with the same signatures."""

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


REFERENCE = Kernels(
    reference.statistics,
    reference.normalize,
    reference.normalize_backward,
    reference.mix,
    reference.mix_backward,
    reference.gelu,
    reference.gelu_backward,
    reference.squared_relu,
    reference.squared_relu_backward,
    reference.residual,
    reference.residual_backward,
)


def kernels_for(x: Tensor) -> Kernels:
    """Return the Triton kernels on NVIDIA GPUs, and the reference kernels elsewhere and for float64."""
    return triton_kernels() if x.is_cuda and x.element_size() < 8 else REFERENCE


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

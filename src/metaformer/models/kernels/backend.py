"""The Triton kernels as one set, which is imported when it is first used."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from torch import Tensor


class Kernels(NamedTuple):
    """The kernels of the operators.

    All tensors are contiguous, and images are [B, H, W, C]. Statistics, factors and sums are float32. `keep` is drop
    path's factor per image, or None where nothing is dropped.
    """

    statistics: Callable[..., Tensor]
    mix: Callable[..., tuple[Tensor, Tensor]]
    normalize: Callable[..., Tensor]
    fold_norms: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    scale_rows: Callable[..., tuple[Tensor, Tensor, Tensor]]
    gelu: Callable[..., Tensor]
    squared_relu: Callable[..., Tensor]
    residual: Callable[..., tuple[Tensor, Tensor]]
    residual_backward: Callable[..., tuple[Tensor, Tensor]]
    gelu_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    squared_relu_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    normalize_backward: Callable[..., tuple[Tensor, ...]]
    finish_sums: Callable[..., tuple[Tensor, Tensor]]
    mix_backward: Callable[..., tuple[Tensor, ...]]
    fc1_gradients: Callable[..., tuple[Tensor, ...]]
    fc2_gradients: Callable[..., tuple[Tensor, ...]]
    normalize_channels: Callable[..., tuple[Tensor, Tensor]]
    norm_backward: Callable[..., tuple[Tensor, ...]]
    add_norm: Callable[..., tuple[Tensor, Tensor]]
    add_norm_backward: Callable[..., tuple[Tensor, ...]]
    mlp: Callable[..., tuple[Tensor, Tensor, Tensor]]
    mlp_backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]


@cache
def triton_kernels() -> Kernels:
    """Import and return the Triton kernels; torch's CPU builds do not include triton."""
    from metaformer.models.kernels import (
        triton_branches,
        triton_elementwise,
        triton_mixer,
        triton_mlp,
        triton_norm,
        triton_weights,
    )

    return Kernels(
        triton_norm.statistics,
        triton_mixer.mix,
        triton_norm.normalize,
        triton_weights.fold_norms,
        triton_weights.scale_rows,
        triton_elementwise.gelu,
        triton_elementwise.squared_relu,
        triton_elementwise.residual,
        triton_elementwise.residual_backward,
        triton_elementwise.gelu_backward,
        triton_elementwise.squared_relu_backward,
        triton_mixer.normalize_backward,
        triton_mixer.finish_sums,
        triton_mixer.mix_backward,
        triton_weights.fc1_gradients,
        triton_weights.fc2_gradients,
        triton_branches.normalize_channels,
        triton_branches.norm_backward,
        triton_branches.add_norm,
        triton_branches.add_norm_backward,
        triton_mlp.mlp,
        triton_mlp.mlp_backward,
    )

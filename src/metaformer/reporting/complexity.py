"""Number of a network's parameters and of its multiply-accumulates per image, counted by fvcore's rules.

The paper counted with fvcore, whose last release is from 2022. torch's `FlopCounterMode` is maintained and counts
matrix products and convolutions in the same way, with two operations for each multiply-accumulate of fvcore. This
module adds fvcore's rules for norms: 5 per element of a GroupNorm and 2 per element of a BatchNorm. Pooling,
activations, additions and LayerScale count as zero. So do LayerNorm over channels and norms without bias, which the
papers' programs implement with operations that fvcore does not count.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


class Complexity(NamedTuple):
    """Parameters of a network and its multiply-accumulates for one image."""

    parameters: int  # trainable parameters
    macs: int


def count_complexity(model: nn.Module, image_size: int = 224) -> Complexity:
    """Count in a forward pass on torch's meta device. The model stays on that device and loses its weights."""
    model = model.to("meta").eval()
    counter = FlopCounterMode(display=False, custom_mapping=_NORMS)
    with counter, torch.no_grad(), nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        model(torch.empty(1, 3, image_size, image_size, device="meta"))
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Complexity(parameters, counter.get_total_flops() // 2)


def _per_element(macs: int) -> Any:
    def flops(input_shape: torch.Size, *args: Any, **kwargs: Any) -> int:
        return 2 * macs * input_shape.numel()

    return flops


def _group_norm(
    input_shape: torch.Size, weight: torch.Size | None, bias: torch.Size | None, *args: Any, **kwargs: Any
) -> int:
    return 0 if bias is None else 2 * 5 * input_shape.numel()


_NORMS = {
    torch.ops.aten.native_group_norm: _group_norm,
    torch.ops.aten.native_batch_norm: _per_element(2),
    torch.ops.aten._native_batch_norm_legit_no_training: _per_element(2),
}

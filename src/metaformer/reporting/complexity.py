"""The size of a network: its parameters, and the multiply-accumulates of one image, counted by fvcore's rules.

The paper's figures were counted by fvcore, whose last release is of 2022. torch's own `FlopCounterMode` is maintained
and counts matrix products and convolutions alike (two operations for fvcore's one multiply-accumulate); fvcore's rules
for norms are added to it here: 5 per element of a GroupNorm, 2 of a BatchNorm. Pooling, activations, additions and
LayerScale count nothing, nor does LayerNorm over channels: the paper's program writes it out in operations that fvcore
does not count.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


class Complexity(NamedTuple):
    """Counts for one image."""

    parameters: int  # those that are trained
    macs: int


def count(model: nn.Module, image_size: int = 224) -> Complexity:
    """Count in a forward pass of shapes alone, on torch's meta device, where the model stays: its weights are gone."""
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


_NORMS = {
    torch.ops.aten.native_group_norm: _per_element(5),
    torch.ops.aten.native_batch_norm: _per_element(2),
    torch.ops.aten._native_batch_norm_legit_no_training: _per_element(2),
}

"""Activations of "MetaFormer Baselines for Vision" (arXiv 2210.13452) that torch does not have."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class StarReLU(nn.Module):
    """scale * relu(x)^2 + bias, with a learned scalar scale and bias that start at 1 and 0.

    Shapes: any. Under autocast, the input is bfloat16 or float16 and the result float32: the parameters promote it
    before it is squared, so inputs from 256 up do not overflow.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        positive = functional.relu(x)
        return self.scale * positive * positive + self.bias


class SquaredReLU(nn.Module):
    """relu(x)^2 (arXiv 2109.08668), in float32 at least: float16 would overflow from 256 up. Shapes: any."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x).to(torch.promote_types(x.dtype, torch.float32)).square()

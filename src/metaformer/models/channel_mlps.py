"""The channel MLP: the part of a MetaFormer block that processes each position separately."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from metaformer.models.initialization import initialize

# Takes the channels of input and output and whether there is a bias; makes a module for [B, C, H, W].
PositionwiseLayer = Callable[[int, int, bool], nn.Conv2d | nn.Linear]


def has_slow_matrix_products(processors: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether torch multiplies float32 matrices with MKL on a processor that is not Intel's.

    There, oneDNN's convolutions take half the time (docs/performance.md, "On a CPU").

    Args:
        processors: Linux's description of the processors.
    """
    if not (torch.backends.mkl.is_available() and processors.exists()):
        return False
    with processors.open() as lines:
        vendor = next((line for line in lines if line.startswith("vendor_id")), "GenuineIntel")
    return "GenuineIntel" not in vendor


CONVOLVE_IN_FLOAT32 = has_slow_matrix_products()


def multiply_channels(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply the channels of each position by a matrix: [B, C, H, W], channels_last, and [D, C] -> [B, D, H, W].

    It is computed as a matrix product, or as a convolution where that is faster.
    """
    in_float32 = x.dtype is torch.float32 and not torch.is_autocast_enabled("cpu")
    if CONVOLVE_IN_FLOAT32 and in_float32 and x.device.type == "cpu":
        return functional.conv2d(x, weight[:, :, None, None], bias)
    return functional.linear(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution, computed as a product with each position's channels where its input is channels_last."""

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_contiguous(memory_format=torch.channels_last):
            return super().forward(x)
        # This permutation gives the gradient the strides of a channels_last weight, as distributed training expects.
        return multiply_channels(x, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)


def conv_layer(in_dim: int, out_dim: int, bias: bool) -> nn.Conv2d:
    """Make a 1x1 convolution, with a weight of shape [out_dim, in_dim, 1, 1]."""
    return PointwiseConv(in_dim, out_dim, 1, bias=bias)


class LinearLayer(nn.Linear):
    """A linear layer over the channels of [B, C, H, W]: a 1x1 convolution whose weight has the shape [out_dim, in_dim].

    timm has such weights in stages with attention. Input that is channels_last is not copied.
    """

    def forward(self, x: Tensor) -> Tensor:
        return multiply_channels(x, self.weight, self.bias)


class Mlp(nn.Module):
    """Two layers over channels with an activation between them: the same MLP at every position."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        activation: Callable[[], nn.Module],
        layer: PositionwiseLayer = conv_layer,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.fc1 = layer(dim, hidden_dim, bias)
        self.act = activation()
        self.fc2 = layer(hidden_dim, dim, bias)
        initialize(self.fc1)
        initialize(self.fc2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out

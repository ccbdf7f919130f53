"""Token mixers: the part of a MetaFormer block that exchanges information between the positions of an image.

All are constructed from (dim, side) and keep the shape [B, dim, side, side]. Only mixers with position-dependent
weights (`RandomMatrix`, `SpatialFC`) require exactly this side.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from metaformer.errors import UserError
from metaformer.models.activations import StarReLU
from metaformer.models.channel_mlps import LinearLayer
from metaformer.models.composition import ATTENTION_HEAD_DIM
from metaformer.models.initialization import initialize


class Pooling(nn.Module):
    """PoolFormer's token mixer: the average over a window minus the input, which the block's residual adds back.

    Padding does not count in the average (paper, section 3.2), so a constant image maps to zero everywhere.
    """

    def __init__(self, dim: int, side: int, pool_size: int = 3) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(pool_size, stride=1, padding=pool_size // 2, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.pool(x)
        return pooled - x


class Identity(nn.Identity):
    """No mixing, for the ablation that measures the rest of the network alone."""

    def __init__(self, dim: int, side: int) -> None:
        super().__init__()


class RandomMatrix(nn.Module):
    """A fixed random matrix over positions: each row is the softmax of numbers from U[0, 1). It is not trained."""

    matrix: Tensor

    def __init__(self, dim: int, side: int) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.rand(side**2, side**2).softmax(dim=-1))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)  # [B, positions, dim], which are views of channels_last maps
        mixed = torch.bmm(self.matrix.expand(x.shape[0], -1, -1), tokens)
        out: Tensor = mixed.transpose(1, 2).unflatten(2, x.shape[2:])
        return out


class DepthwiseConv(nn.Module):
    """A learned 3x3 filter for each channel."""

    def __init__(self, dim: int, side: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


class SeparableConv(nn.Module):
    """ConvFormer's token mixer: 1x1 convolution to twice the channels, StarReLU, 7x7 filter per channel, 1x1 back.

    It is MobileNetV2's inverted separable convolution (arXiv 1801.04381), without biases.
    """

    def __init__(self, dim: int, side: int) -> None:
        super().__init__()
        self.pwconv1 = nn.Conv2d(dim, 2 * dim, 1, bias=False)
        self.act1 = StarReLU()
        self.dwconv = nn.Conv2d(2 * dim, 2 * dim, 7, padding=3, groups=2 * dim, bias=False)
        self.pwconv2 = nn.Conv2d(2 * dim, dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.pwconv2(self.dwconv(self.act1(self.pwconv1(x))))
        return out


class Attention(nn.Module):
    """Multi-head self-attention between all positions (arXiv 1706.03762), with 32 channels per head.

    Args:
        bias: whether the projection of the result has a bias; the projection to query, key and value has none.
    """

    HEAD_DIM = ATTENTION_HEAD_DIM

    def __init__(self, dim: int, side: int, bias: bool = True) -> None:
        super().__init__()
        if dim % self.HEAD_DIM:
            raise ValueError(f"attention needs a multiple of {self.HEAD_DIM} channels, not {dim}")
        self.qkv = LinearLayer(dim, 3 * dim, bias=False)
        self.proj = LinearLayer(dim, dim, bias=bias)
        initialize(self.qkv)
        initialize(self.proj)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.qkv(x).flatten(2).transpose(1, 2)
        # Splitting before transposing gives the gradient of qkv its layout; a permutation would need a copy.
        query, key, value = (part.transpose(1, 2) for part in tokens.unflatten(2, (3, -1, self.HEAD_DIM)).unbind(2))
        mixed = functional.scaled_dot_product_attention(query, key, value)  # the softmax is always in float32
        mixed = mixed.transpose(1, 2).flatten(2).transpose(1, 2)  # [B, dim, positions], as views of tokens
        out: Tensor = self.proj(mixed.unflatten(2, x.shape[2:]))
        return out


class SpatialFC(nn.Module):
    """A linear layer over positions, shared by all channels and without bias (ResMLP, arXiv 2105.03404)."""

    def __init__(self, dim: int, side: int) -> None:
        super().__init__()
        self.fc = nn.Linear(side**2, side**2, bias=False)
        initialize(self.fc)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(x.flatten(2))
        return out.view(x.shape)


def check_pooling(device: torch.device) -> None:
    """Raise an error if the device's pooling gradient for channels_last input differs from the CPU's.

    Some releases of torch compute it wrongly on CUDA (pytorch issue 188344).
    """

    def gradient(on: torch.device, memory_format: torch.memory_format) -> Tensor:
        values = torch.arange(2 * 8 * 7 * 7, dtype=torch.float32, device=on).view(2, 8, 7, 7).sin()
        x = values.clone(memory_format=memory_format).requires_grad_()
        (Pooling(8, 7)(x) * values.flip(0).contiguous(memory_format=memory_format)).sum().backward()
        assert x.grad is not None
        return x.grad.cpu()

    expected = gradient(torch.device("cpu"), torch.contiguous_format)
    if not torch.allclose(gradient(device, torch.channels_last), expected, atol=1e-4):
        raise UserError(
            f"channels_last=true: torch {torch.__version__} computes the gradient of average pooling wrongly on this "
            "device (pytorch issue 188344); set channels_last=false or install a newer torch"
        )

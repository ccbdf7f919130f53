"""The MetaFormer network: a four-stage pyramid of blocks whose token mixer, norm and activation are parts.

Module names are those of timm's `poolformer_*`, so that state dicts pass between the two without renaming. Two things
differ from timm on purpose, because the paper's program does them so: the head norms first and averages over space
after (timm pools first), and convolutions outside the MLPs keep PyTorch's default initialisation.
"""

from collections.abc import Callable, Sequence

import torch
from timm.layers import DropPath
from torch import Tensor, nn

Part = Callable[[int], nn.Module]  # a channel count in, a module for [B, C, H, W] out


def group_norm(dim: int) -> nn.Module:
    """The paper's "modified layer norm": statistics over channels and space of each image, an affine per channel."""
    return nn.GroupNorm(1, dim, eps=1e-5)


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch (CaiT, arXiv 2103.17239)."""

    def __init__(self, dim: int, initial_value: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((dim,), initial_value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.view(-1, 1, 1)


class Mlp(nn.Module):
    """Two 1x1 convolutions with an activation between them: the same small network at every position."""

    def __init__(self, dim: int, hidden_dim: int, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden_dim, 1)
        self.act = activation()
        self.fc2 = nn.Conv2d(hidden_dim, dim, 1)
        for conv in (self.fc1, self.fc2):
            nn.init.trunc_normal_(conv.weight, std=0.02)
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class MetaFormerBlock(nn.Module):
    """x + ls1 * mixer(norm1(x)), then x + ls2 * mlp(norm2(x)), drop path on both branches.

    Shapes: [B, dim, H, W] -> [B, dim, H, W].
    """

    def __init__(
        self,
        dim: int,
        token_mixer: Part,
        norm: Part,
        activation: Callable[[], nn.Module],
        drop_path_rate: float,
        layer_scale_init: float,
    ) -> None:
        super().__init__()
        self.norm1 = norm(dim)
        self.token_mixer = token_mixer(dim)
        self.drop_path1 = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()
        self.layer_scale1 = LayerScale(dim, layer_scale_init)
        self.norm2 = norm(dim)
        self.mlp = Mlp(dim, 4 * dim, activation)
        self.drop_path2 = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()
        self.layer_scale2 = LayerScale(dim, layer_scale_init)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.layer_scale1(self.token_mixer(self.norm1(x))))
        x = x + self.drop_path2(self.layer_scale2(self.mlp(self.norm2(x))))
        return x


class Downsampling(nn.Module):
    """A strided convolution without a norm: the stem (7x7, stride 4) and the step between stages (3x3, stride 2)."""

    def __init__(self, in_dim: int, out_dim: int, kernel_size: int, stride: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, out_dim, kernel_size, stride=stride, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


class Stage(nn.Module):
    """Downsampling (none in the first stage), then the blocks of one resolution."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.blocks(self.downsample(x))
        return out


class Head(nn.Module):
    """Norm, THEN the mean over space, then the classifier: the paper's order."""

    def __init__(self, dim: int, norm: Part, num_classes: int) -> None:
        super().__init__()
        self.norm = norm(dim)
        self.fc = nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(self.fc.weight, std=0.02)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.norm(x).mean((-2, -1)))
        return out


class MetaFormer(nn.Module):
    """The whole network: images [B, 3, H, W] (H and W from 32 up) to logits [B, num_classes].

    Args:
        depths: blocks in each stage.
        dims: channels in each stage.
        token_mixers: the token mixer of each stage.
        norm, activation: parts of every block.
        drop_path_rate: drop path of the last block; it rises linearly from 0 at the first.
        layer_scale_init: initial value of every LayerScale.
        num_classes: logits.
    """

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        token_mixers: Sequence[Part],
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
        layer_scale_init: float = 1e-5,
        norm: Part = group_norm,
        activation: Callable[[], nn.Module] = nn.GELU,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.stem = Downsampling(3, dims[0], kernel_size=7, stride=4, padding=2)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), dtype=torch.float64).tolist())
        stages = []
        for i, (depth, dim, token_mixer) in enumerate(zip(depths, dims, token_mixers, strict=True)):
            downsample = Downsampling(dims[i - 1], dim, kernel_size=3, stride=2, padding=1) if i else nn.Identity()
            blocks = [
                MetaFormerBlock(dim, token_mixer, norm, activation, next(rates), layer_scale_init) for _ in range(depth)
            ]
            stages.append(Stage(downsample, blocks))
        self.stages = nn.Sequential(*stages)
        self.head = Head(dims[-1], norm, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.stages(self.stem(x)))
        return logits

"""The MetaFormer network: a four-stage pyramid of blocks with a configurable token mixer, norm and activation.

Module names match timm's `poolformer_*`, so that state dicts can be exchanged without renaming. Two things differ from
timm on purpose, because the paper's program does them this way: the head applies the norm first and then averages over
space (timm pools first), and convolutions outside the MLPs keep PyTorch's default initialisation.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from metaformer.models.initialization import initialize
from metaformer.models.norms import group_norm

Norm = Callable[[int], nn.Module]  # takes channels; makes a module for [B, C, H, W]
TokenMixer = Callable[[int, int], nn.Module]  # takes channels and side (positions); makes the same


@dataclass(frozen=True)
class BlockParts:
    """The parts of a block besides its token mixer; each of the paper's ablations changes one of them.

    Attributes:
        residual: whether a branch is added to its input (True) or replaces it (False).
        channel_mlp: whether the block has its second branch.
    """

    norm: Norm = group_norm
    activation: Callable[[], nn.Module] = nn.GELU
    layer_scale_init: float = 1e-5
    residual: bool = True
    channel_mlp: bool = True


POOLFORMER_PARTS = BlockParts()


@dataclass(frozen=True)
class Architecture:
    """The settings that define a network.

    Attributes:
        depths: blocks in each stage.
        dims: channels in each stage.
        token_mixers: the token mixer of each stage.
        drop_path_rate: drop path rate of the last block; the rate rises linearly from 0 at the first block.
        parts: the other parts of every block.
        position_embedding_stage: the stage that adds a position embedding before its blocks, if any.
    """

    depths: Sequence[int]
    dims: Sequence[int]
    token_mixers: Sequence[TokenMixer]
    drop_path_rate: float = 0.0
    parts: BlockParts = POOLFORMER_PARTS
    position_embedding_stage: int | None = None


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch (CaiT, arXiv 2103.17239)."""

    def __init__(self, dim: int, initial_value: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((dim,), initial_value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.view(-1, 1, 1)


class Mlp(nn.Module):
    """Two 1x1 convolutions with an activation between them: the same MLP at every position."""

    def __init__(self, dim: int, hidden_dim: int, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden_dim, 1)
        self.act = activation()
        self.fc2 = nn.Conv2d(hidden_dim, dim, 1)
        initialize(self.fc1)
        initialize(self.fc2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class MetaFormerBlock(nn.Module):
    """A block: x + ls1 * mixer(norm1(x)), then x + ls2 * mlp(norm2(x)), with drop path on both branches.

    Shapes: [B, dim, H, W] -> [B, dim, H, W].
    """

    def __init__(self, dim: int, side: int, token_mixer: TokenMixer, drop_path_rate: float, parts: BlockParts) -> None:
        super().__init__()
        self.residual = parts.residual
        self.norm1 = parts.norm(dim)
        self.token_mixer = token_mixer(dim, side)
        self.drop_path1 = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()
        self.layer_scale1 = LayerScale(dim, parts.layer_scale_init)
        self.channel_mlp = parts.channel_mlp
        if self.channel_mlp:
            self.norm2 = parts.norm(dim)
            self.mlp = Mlp(dim, 4 * dim, parts.activation)
            self.drop_path2 = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()
            self.layer_scale2 = LayerScale(dim, parts.layer_scale_init)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.drop_path1(self.layer_scale1(self.token_mixer(self.norm1(x))))
        x = x + branch if self.residual else branch
        if self.channel_mlp:
            branch = self.drop_path2(self.layer_scale2(self.mlp(self.norm2(x))))
            x = x + branch if self.residual else branch
        return x


class Downsampling(nn.Module):
    """A strided convolution without a norm: the stem (7x7, stride 4) and the step between stages (3x3, stride 2)."""

    def __init__(self, in_dim: int, out_dim: int, kernel_size: int, stride: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, out_dim, kernel_size, stride=stride, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


def run_plain(blocks: nn.Sequential, x: Tensor) -> Tensor:
    """Run the blocks one after the other, without fused operators."""
    out: Tensor = blocks(x)
    return out


class Stage(nn.Module):
    """Downsampling (except in the first stage), an optional position embedding [1, dim, side, side], and the blocks.

    Attributes:
        run_blocks: the function that computes the blocks; `fused.fuse` replaces it.
    """

    def __init__(
        self, downsample: nn.Module, blocks: Sequence[nn.Module], embedding_shape: Sequence[int] | None
    ) -> None:
        super().__init__()
        self.downsample = downsample
        self.position_embedding = nn.Parameter(torch.zeros(*embedding_shape)) if embedding_shape else None
        self.blocks = nn.Sequential(*blocks)
        self.run_blocks: Callable[[nn.Sequential, Tensor], Tensor] = run_plain

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        if self.position_embedding is not None:
            x = x + self.position_embedding
        return self.run_blocks(self.blocks, x)


class Head(nn.Module):
    """Norm, then the mean over space, then the classifier, in the paper's order."""

    def __init__(self, dim: int, norm: Norm, num_classes: int) -> None:
        super().__init__()
        self.norm = norm(dim)
        self.fc = nn.Linear(dim, num_classes)
        initialize(self.fc)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.norm(x).mean((-2, -1)))
        return out


def stage_sides(image_size: int, stages: int) -> list[int]:
    """Return the side of each stage's feature map, in positions, for images of `image_size` x `image_size` pixels."""
    sides = [(image_size - 3) // 4 + 1]  # after the stem
    while len(sides) < stages:
        sides.append((sides[-1] + 1) // 2)
    return sides


class MetaFormer(nn.Module):
    """The whole network, from images [B, 3, H, W] (H and W at least 32) to logits [B, num_classes].

    Args:
        architecture: the settings that define the network.
        num_classes: number of logits.
        image_size: side of the images in pixels. Only position embeddings and token mixers with position-dependent
            weights use it.
    """

    def __init__(self, architecture: Architecture, num_classes: int = 1000, image_size: int = 224) -> None:
        super().__init__()
        depths, dims, parts = architecture.depths, architecture.dims, architecture.parts
        self.num_classes = num_classes
        self.stem = Downsampling(3, dims[0], kernel_size=7, stride=4, padding=2)
        rates = iter(torch.linspace(0, architecture.drop_path_rate, sum(depths), dtype=torch.float64).tolist())
        sides = stage_sides(image_size, len(depths))
        stages = []
        for i, (depth, dim, side, token_mixer) in enumerate(
            zip(depths, dims, sides, architecture.token_mixers, strict=True)
        ):
            downsample: nn.Module = nn.Identity()
            if i:
                downsample = Downsampling(dims[i - 1], dim, kernel_size=3, stride=2, padding=1)
            blocks = [MetaFormerBlock(dim, side, token_mixer, next(rates), parts) for _ in range(depth)]
            embedding_shape = (1, dim, side, side) if i == architecture.position_embedding_stage else None
            stages.append(Stage(downsample, blocks, embedding_shape))
        self.stages = nn.Sequential(*stages)
        self.head = Head(dims[-1], parts.norm, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.stages(self.stem(x)))
        return logits

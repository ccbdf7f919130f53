"""The MetaFormer network: a pyramid of stages of blocks, composed of a token mixer, norm, activation and other parts.

Module names match timm's `poolformer_*`, `poolformerv2_*`, `convformer_*` and `caformer_*`, so that state dicts can be
exchanged without renaming. Some things differ from timm on purpose, because the papers' programs do them this way. In
PoolFormer, the head applies the norm first and then averages over space (timm pools first), and convolutions outside
the MLPs keep PyTorch's default initialisation. In the MLP head of ConvFormer and CAFormer, dropout comes before the
last layer (timm: before the first), and the norm has eps 1e-5 (timm: 1e-6).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from metaformer.models.channel_mlps import Mlp, PositionwiseLayer, conv_layer
from metaformer.models.heads import HeadPart, NormFirstHead
from metaformer.models.initialization import initialize
from metaformer.models.norms import Norm, group_norm, no_norm

TokenMixer = Callable[[int, int], nn.Module]  # takes channels and side (positions); makes the same


@dataclass(frozen=True)
class BlockParts:
    """The parts of a block besides its token mixer; each of the paper's ablations changes one of them.

    Attributes:
        layer_scale_init: initial value of LayerScale on the branches; None leaves it out.
        residual: whether a branch is added to its input (True) or replaces it (False).
        residual_scale: whether the input is multiplied by a learned factor per channel, from 1, before that addition.
        channel_mlp: whether the block has its second branch.
        mlp_layer, mlp_bias: the layers of that branch.
    """

    norm: Norm = group_norm
    activation: Callable[[], nn.Module] = nn.GELU
    layer_scale_init: float | None = 1e-5
    residual: bool = True
    residual_scale: bool = False
    channel_mlp: bool = True
    mlp_layer: PositionwiseLayer = conv_layer
    mlp_bias: bool = True


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
        stage_parts: parts of each stage's blocks, instead of `parts`.
        downsampling_norm: the norm after the stem's convolution and before those between stages.
        head: takes channels, classes, the norm of `parts` and a dropout rate; makes the head.
        head_dropout: dropout rate in the head.
        initialize_all: draw all convolutions and linear layers as `initialize` does, not only those of MLPs and head.
    """

    depths: Sequence[int]
    dims: Sequence[int]
    token_mixers: Sequence[TokenMixer]
    drop_path_rate: float = 0.0
    parts: BlockParts = POOLFORMER_PARTS
    position_embedding_stage: int | None = None
    stage_parts: Sequence[BlockParts] | None = None
    downsampling_norm: Norm = no_norm
    head: HeadPart = NormFirstHead
    head_dropout: float = 0.0
    initialize_all: bool = False


class ChannelScale(nn.Module):
    """A learned factor per channel: LayerScale on a residual branch (CaiT, arXiv 2103.17239), or a residual scale."""

    def __init__(self, dim: int, initial_value: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((dim,), initial_value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.view(-1, 1, 1)


class MetaFormerBlock(nn.Module):
    """A block: x + ls1 * mixer(norm1(x)), then x + ls2 * mlp(norm2(x)), with drop path on both branches.

    With `residual_scale`, rs1 * x and rs2 * x take the place of x in the sums.
    Shapes: [B, dim, H, W] -> [B, dim, H, W].

    Attributes:
        residual: whether branches are added to their input. Fused operators compute such blocks only.
    """

    def __init__(self, dim: int, side: int, token_mixer: TokenMixer, drop_path_rate: float, parts: BlockParts) -> None:
        super().__init__()
        self.residual = parts.residual
        self.norm1 = parts.norm(dim)
        self.token_mixer = token_mixer(dim, side)
        self.drop_path1 = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()
        self.layer_scale1 = _scale(dim, parts.layer_scale_init)
        self.res_scale1 = _scale(dim, 1.0 if parts.residual_scale else None)
        self.channel_mlp = parts.channel_mlp
        if self.channel_mlp:
            self.norm2 = parts.norm(dim)
            self.mlp = Mlp(dim, 4 * dim, parts.activation, parts.mlp_layer, parts.mlp_bias)
            self.drop_path2 = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()
            self.layer_scale2 = _scale(dim, parts.layer_scale_init)
            self.res_scale2 = _scale(dim, 1.0 if parts.residual_scale else None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix_tokens(x)
        if self.channel_mlp:
            branch = self.drop_path2(self.layer_scale2(self.mlp(self.norm2(x))))
            x = self.res_scale2(x) + branch if self.residual else branch
        return x

    def mix_tokens(self, x: Tensor) -> Tensor:
        """Compute the first branch and add it to its input."""
        branch = self.drop_path1(self.layer_scale1(self.token_mixer(self.norm1(x))))
        out: Tensor = self.res_scale1(x) + branch if self.residual else branch
        return out


def _scale(dim: int, initial_value: float | None) -> Any:
    return nn.Identity() if initial_value is None else ChannelScale(dim, initial_value)


class Stem(nn.Module):
    """A 7x7 convolution with stride 4, then a norm: [B, 3, H, W] -> [B, dim, about H / 4, W / 4]."""

    def __init__(self, dim: int, norm: Norm) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, dim, 7, stride=4, padding=2)
        self.norm = norm(dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(x))
        return out


class Downsampling(nn.Module):
    """The step between stages: a norm, then a 3x3 convolution with stride 2."""

    def __init__(self, in_dim: int, out_dim: int, norm: Norm) -> None:
        super().__init__()
        self.norm = norm(in_dim)
        self.conv = nn.Conv2d(in_dim, out_dim, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(self.norm(x))
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


def stage_sides(image_size: int, stages: int) -> list[int]:
    """Return the side of each stage's feature map, in positions, for images of `image_size` x `image_size` pixels."""
    sides = [(image_size - 3) // 4 + 1]  # after the stem
    while len(sides) < stages:
        sides.append((sides[-1] + 1) // 2)
    return sides


class MetaFormer(nn.Module):
    """The whole network, from images [B, 3, H, W] (H and W at least 32 with four stages) to logits [B, num_classes].

    Args:
        architecture: the settings that define the network.
        num_classes: number of logits.
        image_size: side of the images in pixels. Only position embeddings and token mixers with position-dependent
            weights use it.

    Attributes:
        num_features: channels of the last stage.
        feature_info: timm's description of the feature maps of the stages: channels, reduction of the image's side, and
            name of the module that computes them.
    """

    def __init__(self, architecture: Architecture, num_classes: int = 1000, image_size: int = 224) -> None:
        super().__init__()
        depths, dims = architecture.depths, architecture.dims
        self.num_classes = num_classes
        self.num_features = dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(dims)
        ]
        self.stem = Stem(dims[0], architecture.downsampling_norm)
        rates = torch.linspace(0, architecture.drop_path_rate, sum(depths), dtype=torch.float64, device="cpu").tolist()
        sides = stage_sides(image_size, len(depths))
        stages = []
        for i, (depth, dim, side, token_mixer, parts) in enumerate(
            zip(depths, dims, sides, architecture.token_mixers, _stage_parts(architecture), strict=True)
        ):
            downsample = Downsampling(dims[i - 1], dim, architecture.downsampling_norm) if i else nn.Identity()
            first = sum(depths[:i])
            blocks = [MetaFormerBlock(dim, side, token_mixer, rate, parts) for rate in rates[first : first + depth]]
            embedding_shape = (1, dim, side, side) if i == architecture.position_embedding_stage else None
            stages.append(Stage(downsample, blocks, embedding_shape))
        self.stages = nn.Sequential(*stages)
        self.head: Any = architecture.head(dims[-1], num_classes, architecture.parts.norm, architecture.head_dropout)
        if architecture.initialize_all:
            for module in self.modules():
                if isinstance(module, nn.Linear | nn.Conv2d):
                    initialize(module)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's description of the layers, for its layer-wise learning rates: patterns of parameter names.

        Args:
            coarse: stages instead of blocks.
        """
        between = r"^stages\.(\d+)\.(?:downsample|position_embedding)"
        blocks = [(between, (-1,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else blocks}

    def get_classifier(self) -> nn.Module:
        """Return the classifier: the head without norm and pooling."""
        classifier: nn.Module = self.head.fc
        return classifier

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last stage's feature map of images: [B, 3, H, W] -> [B, num_features, about H / 32, W / 32]."""
        features: Tensor = self.stages(self.stem(x))
        return features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits [B, num_classes] of a feature map of the last stage.

        Args:
            pre_logits: return the features before the classifier instead, [B, num_features].
        """
        out: Tensor = self.head(x, pre_logits=True) if pre_logits else self.head(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _stage_parts(architecture: Architecture) -> Sequence[BlockParts]:
    return architecture.stage_parts or [architecture.parts] * len(architecture.depths)

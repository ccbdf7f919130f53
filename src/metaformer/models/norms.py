"""Norms of a MetaFormer: the paper's own, and those of its ablations. All map [B, C, H, W] to the same shape."""

from torch import Tensor, nn
from torch.nn import functional


def group_norm(dim: int) -> nn.Module:
    """The paper's "modified layer norm": statistics over channels and space of each image, an affine per channel."""
    return nn.GroupNorm(1, dim, eps=1e-5)


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of each position, as in transformers; an affine per channel."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        channels_last = x.permute(0, 2, 3, 1)
        normed = functional.layer_norm(channels_last, self.normalized_shape, self.weight, self.bias, self.eps)
        return normed.permute(0, 3, 1, 2)


def no_norm(dim: int) -> nn.Module:
    """The ablation without norms."""
    return nn.Identity()

"""Norms of a MetaFormer: those of both papers and of the ablations. All of them keep the shape [B, C, H, W]."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

Norm = Callable[[int], nn.Module]  # takes channels; makes a module for [B, C, H, W]
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def group_norm(dim: int) -> nn.Module:
    """Make the paper's "modified layer norm": statistics per image over channels and space, one affine per channel."""
    return nn.GroupNorm(1, dim, eps=1e-5)


class GroupNormWithoutBias(nn.GroupNorm):
    """The norm of the second paper's pooling networks: as `group_norm`, with eps 1e-6 and a weight but no bias."""

    def __init__(self, dim: int) -> None:
        super().__init__(1, dim, eps=1e-6)
        self.register_parameter("bias", None)


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of each position, as in transformers, with one affine per channel."""

    def __init__(self, dim: int, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__(dim, eps=eps, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        channels_last = x.permute(0, 2, 3, 1)
        normed = functional.layer_norm(channels_last, self.normalized_shape, self.weight, self.bias, self.eps)
        return normed.permute(0, 3, 1, 2)


def no_norm(dim: int) -> nn.Module:
    """Make the identity, for the ablation without norms."""
    return nn.Identity()


@torch.no_grad()
def find_single_value_batch_norm(model: nn.Module, images: Tensor) -> str | None:
    """Return the name of a BatchNorm that sees one value per channel from each image, or None if there is none.

    Such a layer computes statistics only over several images, so it cannot train on a batch of one.

    Args:
        model: the network; it is left unchanged.
        images: [B, 3, S, S], B at least 1.
    """
    names: dict[nn.Module, str] = {
        module: name for name, module in model.named_modules() if isinstance(module, BATCH_NORMS)
    }
    found: list[str] = []

    def record(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].numel() == inputs[0].shape[0] * inputs[0].shape[1]:
            found.append(names[norm])

    hooks = [norm.register_forward_pre_hook(record) for norm in names]
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.compiler.set_stance("force_eager"):
            model.eval()(images)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    return found[0] if found else None

"""Norms of a MetaFormer: the paper's own, and those of its ablations. All map [B, C, H, W] to the same shape."""

import torch
from torch import Tensor, nn
from torch.nn import functional

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


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


@torch.no_grad()
def find_norm_over_images(model: nn.Module, images: Tensor) -> str | None:
    """Return the name of a BatchNorm that gets one value per channel from each image; None if there is none.

    Such a layer has statistics only over several images, and does not train on one.

    Args:
        model: it is as before afterwards.
        images: [B, 3, S, S], B at least 1.
    """
    names: dict[nn.Module, str] = {
        module: name for name, module in model.named_modules() if isinstance(module, BATCH_NORMS)
    }
    found: list[str] = []

    def look(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].numel() == inputs[0].shape[0] * inputs[0].shape[1]:
            found.append(names[norm])

    hooks = [norm.register_forward_pre_hook(look) for norm in names]
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

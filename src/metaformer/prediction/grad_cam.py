"""Grad-CAM (arXiv 1610.02391): heat maps of the positions at which a layer's features support a class."""

import math
from typing import Any

import torch
from torch import Tensor, nn


def grad_cam(model: nn.Module, layer: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits of images, and a heat map for the most probable class of each.

    Args:
        model: a network in evaluation mode.
        layer: a part of it whose output is features [B, C, H, W], [B, H, W, C] or tokens [B, N, C], where the last
            H * H tokens are positions.
        images: float32 [B, 3, S, S].

    Returns:
        Logits, float32 [B, classes], and maps, float32 [B, H, W] in [0, 1]. A map is all zero where no position speaks
        for the class.

    Raises:
        ValueError: the layer's output is something else, or has a single position; or the logits do not depend on it.
    """
    kept: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> Tensor:
        """Cut the graph here, so that gradients are computed only for later layers."""
        if not isinstance(output, Tensor) or output.ndim not in (3, 4):
            raise ValueError("its output is not a tensor of features or tokens")
        kept.append(output.detach().requires_grad_())
        return kept[-1]

    hook = layer.register_forward_hook(keep)
    try:
        with torch.enable_grad():
            logits = model.forward(images).float()  # after model.compile(), only __call__ is compiled, without hooks
    finally:
        hook.remove()
    if not kept or not logits.requires_grad:
        raise ValueError("the prediction does not depend on it")
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(logits.max(1).values.sum(), kept[-1])
    gradients, features = (_channels_first(each.float()) for each in (gradient, kept[-1].detach()))
    if features.shape[2:].numel() == 1:
        raise ValueError("its output has a single position, of which a map shows nothing")
    heat = (gradients.mean((2, 3), keepdim=True) * features).sum(1).relu()
    peak = heat.amax((1, 2), keepdim=True)
    return logits.detach(), heat / peak.where(peak > 0, 1.0)


def _channels_first(features: Tensor) -> Tensor:
    """Return features as [B, C, H, W]."""
    if features.ndim == 3:
        side = math.isqrt(features.shape[1])  # class and register tokens come before the positions
        tokens: Tensor = features[:, -(side**2) :].transpose(1, 2)
        return tokens.reshape(len(tokens), -1, side, side)
    is_last = features.shape[2] != features.shape[3] and features.shape[1] == features.shape[2]
    return features.permute(0, 3, 1, 2) if is_last else features

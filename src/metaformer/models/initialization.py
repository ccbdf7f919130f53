"""The paper's initialisation of linear layers and MLP convolutions; all other layers keep PyTorch's default."""

from torch import nn


def initialize(layer: nn.Linear | nn.Conv2d) -> None:
    """Draw weights from a normal distribution with std .02, truncated at ±2 as in ViT and DeiT; set the bias to 0."""
    nn.init.trunc_normal_(layer.weight, std=0.02)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)

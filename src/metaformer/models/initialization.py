"""The paper's initialisation of linear layers and the MLPs' convolutions; all else keeps PyTorch's default."""

from torch import nn


def initialize(layer: nn.Linear | nn.Conv2d) -> None:
    """Weights from a normal distribution of std .02, truncated at ±2 (ViT's and DeiT's); a bias becomes 0. In place."""
    nn.init.trunc_normal_(layer.weight, std=0.02)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)

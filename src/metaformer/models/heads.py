"""Heads, which map the last stage's features [B, dim, H, W] to logits [B, num_classes].

All are constructed from (dim, num_classes, norm, dropout); `norm` is the norm of the network's blocks. With
`pre_logits`, they return the features before their classifier, [B, dim].
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from metaformer.models.activations import SquaredReLU
from metaformer.models.initialization import initialize
from metaformer.models.norms import Norm

HeadPart = Callable[[int, int, Norm, float], nn.Module]


def mean_over_space(x: Tensor) -> Tensor:
    """Return the mean over positions, [B, C, H, W] -> [B, C], whose gradient has the memory format of x.

    The gradient of a mean over the last two dimensions is never channels_last, so the whole last stage would copy it.
    """
    if x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).mean((1, 2))
    return x.mean((-2, -1))


class NormFirstHead(nn.Module):
    """The first paper's head: the blocks' norm, then the mean over space, then a linear classifier."""

    def __init__(self, dim: int, num_classes: int, norm: Norm, dropout: float = 0.0) -> None:
        super().__init__()
        _refuse_dropout(dropout)
        self.norm = norm(dim)
        self.fc = nn.Linear(dim, num_classes)
        initialize(self.fc)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        features: Tensor = mean_over_space(self.norm(x))
        return features if pre_logits else self.fc(features)


class MeanFirstHead(nn.Module):
    """The second paper's head: the mean over space, then LayerNorm with eps 1e-6, then a classifier."""

    def __init__(self, dim: int, classifier: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.fc = classifier

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        features: Tensor = self.norm(mean_over_space(x))
        return features if pre_logits else self.fc(features)


class MlpClassifier(nn.Module):
    """A classifier with a hidden layer of 4 * dim: [B, dim] -> [B, num_classes].

    Dropout comes directly before the last layer, and the norm's eps is 1e-5, as in the authors' code. In timm, dropout
    comes before the first layer, and eps is 1e-6.
    """

    def __init__(self, dim: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.act = SquaredReLU()
        self.norm = nn.LayerNorm(4 * dim)
        self.fc2 = nn.Linear(4 * dim, num_classes)
        self.head_drop = nn.Dropout(dropout)
        initialize(self.fc1)
        initialize(self.fc2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.head_drop(self.norm(self.act(self.fc1(x)))))
        return out


def linear_head(dim: int, num_classes: int, norm: Norm, dropout: float) -> nn.Module:
    """Make the head of IdentityFormer, RandFormer and PoolFormerV2."""
    _refuse_dropout(dropout)
    classifier = nn.Linear(dim, num_classes)
    initialize(classifier)
    return MeanFirstHead(dim, classifier)


def mlp_head(dim: int, num_classes: int, norm: Norm, dropout: float) -> nn.Module:
    """Make the head of ConvFormer and CAFormer."""
    return MeanFirstHead(dim, MlpClassifier(dim, num_classes, dropout))


def _refuse_dropout(dropout: float) -> None:
    if dropout:
        raise ValueError(f"head_dropout={dropout}: only the head `mlp` has dropout")

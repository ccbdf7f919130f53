"""Training losses."""

from collections.abc import Callable

from timm.loss import BinaryCrossEntropy
from torch import Tensor
from torch.nn import functional

from metaformer.training.config import LossConfig, LossName

Loss = Callable[[Tensor, Tensor], Tensor]  # of float32 logits [B, C] and soft targets [B, C]; returns a scalar


def make_loss(config: LossConfig) -> Loss:
    """Return the configured loss, a mean over the batch's images."""
    return _MAKERS[config.name](config)


def _binary_cross_entropy(config: LossConfig) -> Loss:
    loss: Loss = BinaryCrossEntropy(
        smoothing=0.0,  # the targets are already smoothed
        target_threshold=config.target_threshold,
        sum_classes=config.sum_classes,
    )
    return loss


_MAKERS: dict[LossName, Callable[[LossConfig], Loss]] = {
    LossName.cross_entropy: lambda config: functional.cross_entropy,
    LossName.bce: _binary_cross_entropy,
}

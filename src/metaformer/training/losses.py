"""Training losses."""

from collections.abc import Callable

from timm.loss import BinaryCrossEntropy
from torch import Tensor
from torch.nn import functional

from metaformer.interfaces import Batch
from metaformer.training.config import LossConfig, LossName

Loss = Callable[[Tensor, Batch], Tensor]  # maps float32 logits [B, C] and their batch to a scalar
_OfTargets = Callable[[Tensor, Tensor], Tensor]  # maps float32 logits [B, C] and soft targets [B, C] to a scalar


def make_loss(config: LossConfig) -> Loss:
    """Return the configured loss, a mean over the batch's images."""
    of_targets = _MAKERS[config.name](config)
    return lambda logits, batch: of_targets(logits, batch.targets)


def _binary_cross_entropy(config: LossConfig) -> _OfTargets:
    loss: _OfTargets = BinaryCrossEntropy(
        smoothing=0.0,  # the targets are already smoothed
        target_threshold=config.target_threshold,
        sum_classes=config.sum_classes,
    )
    return loss


_MAKERS: dict[LossName, Callable[[LossConfig], _OfTargets]] = {
    LossName.cross_entropy: lambda config: functional.cross_entropy,
    LossName.bce: _binary_cross_entropy,
}

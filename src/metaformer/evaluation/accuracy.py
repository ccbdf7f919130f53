"""Top-1, top-5 and loss over a whole split: sums over images, reduced over the ranks once."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import nn

from metaformer.errors import Interrupted
from metaformer.evaluation.scoring import SINGLE_LABEL, Scoring
from metaformer.interfaces import BatchSource
from metaformer.runtime import Runtime


class Autocast(Protocol):
    """What evaluation needs to know of the precision."""

    def autocast(self) -> Any:
        """The context of a forward pass."""


@dataclass(frozen=True)
class Accuracy:
    """The result of one evaluation."""

    top1: float  # percent
    top5: float  # percent; of fewer than five classes, 100
    loss: float  # mean
    images: int  # counted, each once

    def as_dict(self) -> dict[str, Any]:
        """For a row of metrics."""
        return asdict(self)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    data: BatchSource,
    precision: Autocast,
    runtime: Runtime,
    scoring: Scoring = SINGLE_LABEL,
    stop: Callable[[], bool] = lambda: False,
) -> Accuracy:
    """Evaluate on every image of the data over all ranks; every rank gets the result.

    The model is left in evaluation mode.

    Args:
        stop: asked by all ranks before each batch whether to stop, and equally often by ranks with fewer batches; gives
            all of them the same answer.

    Raises:
        Interrupted: they stopped.
    """
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=runtime.device)  # top-1, top-5, loss, images
    batches = data.epoch(0)
    for _ in range(data.rounds_per_epoch):
        if stop():
            raise Interrupted("the evaluation was interrupted")
        batch = next(batches, None)
        if batch is None:
            continue
        with precision.autocast():
            logits = model(batch.images).float()
        scores = scoring(logits, batch.targets)
        sums[0] += scores.top1.sum()
        sums[1] += scores.top5.sum()
        sums[2] += scores.loss.sum()
        sums[3] += len(batch.targets)
    top1, top5, loss, images = runtime.sum(sums).tolist()
    return Accuracy(100 * top1 / images, 100 * top5 / images, loss / images, int(images))

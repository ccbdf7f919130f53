"""Top-1, top-5 and loss of a whole split, summed over images and reduced once over the ranks."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from metaformer.errors import Interrupted
from metaformer.evaluation.scoring import SINGLE_LABEL, Scores, Scoring
from metaformer.interfaces import BatchSource
from metaformer.runtime import Runtime


class Autocast(Protocol):
    """The part of the precision that evaluation uses."""

    def autocast(self) -> Any:
        """Return the context manager of a forward pass."""


@dataclass(frozen=True)
class Accuracy:
    """The result of one evaluation."""

    top1: float  # percent
    top5: float  # percent; 100 for fewer than five classes
    loss: float  # mean
    images: int  # each counted once

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as a row of metrics."""
        return asdict(self)


def ignore(targets: Tensor, scores: Scores) -> None:
    """Do nothing with a batch's targets and scores."""


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    data: BatchSource,
    precision: Autocast,
    runtime: Runtime,
    scoring: Scoring = SINGLE_LABEL,
    stop: Callable[[], bool] = lambda: False,
    observe: Callable[[Tensor, Scores], None] = ignore,
) -> Accuracy:
    """Evaluate a model on every image of the data over all ranks, and return the result on every rank.

    The model is left in evaluation mode.

    Args:
        model: the network.
        data: this rank's batches.
        precision: its autocast is used for the forward pass.
        runtime: the ranks to reduce over.
        scoring: the definition of correct predictions and of the loss.
        stop: a function that all ranks call before each batch, and equally often on ranks with fewer batches. It must
            return the same answer on all ranks; True stops the evaluation.
        observe: receives the targets and scores of each batch.

    Raises:
        Interrupted: `stop` returned True.
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
        observe(batch.targets, scores)
        sums[0] += scores.top1.sum()
        sums[1] += scores.top5.sum()
        sums[2] += scores.loss.sum()
        sums[3] += len(batch.targets)
    top1, top5, loss, images = runtime.sum(sums).tolist()
    return Accuracy(100 * top1 / images, 100 * top5 / images, loss / images, int(images))

"""Counts per class over a split: images, correct predictions, and the classes predicted instead."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metaformer.evaluation.scoring import Scores
from metaformer.runtime import Runtime

MAX_CONFUSION_CLASSES = 1000


@dataclass(frozen=True)
class ClassTotals:
    """Counts over all ranks.

    Attributes:
        images, top1, top5: int64 [C], the images of each class, and the number that were predicted correctly.
        confusion: int64 [C, C], images of the row's class that were predicted as the column's; None for more than
            MAX_CONFUSION_CLASSES classes.
    """

    images: NDArray[np.int64]
    top1: NDArray[np.int64]
    top5: NDArray[np.int64]
    confusion: NDArray[np.int64] | None


class ClassCounts:
    """Counts batches on the device, without making the host wait.

    Args:
        num_classes: number C of the network's outputs.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self._num_classes = num_classes
        pairs = num_classes**2 if num_classes <= MAX_CONFUSION_CLASSES else 0
        self._sums = torch.zeros(3 * num_classes + pairs, dtype=torch.int64, device=device)

    def add(self, targets: Tensor, scores: Scores) -> None:
        """Count a batch with int64 labels [B]."""
        images, top1, top5, pairs = self._parts(self._sums)
        # Unlike torch.bincount, this does not wait for the device; sums of integers do not depend on their order.
        images.scatter_add_(0, targets, torch.ones_like(targets))
        top1.scatter_add_(0, targets, scores.top1.long())
        top5.scatter_add_(0, targets, scores.top5.long())
        if len(pairs):
            pairs.scatter_add_(0, targets * self._num_classes + scores.predicted, torch.ones_like(targets))

    def total(self, runtime: Runtime) -> ClassTotals:
        """Return the sums over all ranks, on every rank. All ranks must call this."""
        images, top1, top5, pairs = (part.cpu().numpy() for part in self._parts(runtime.sum(self._sums)))
        return ClassTotals(images, top1, top5, pairs.reshape(self._num_classes, -1) if len(pairs) else None)

    def _parts(self, sums: Tensor) -> tuple[Tensor, ...]:
        """Return views of images, top-1 and top-5 [C], and of the pairs of classes [C * C] or [0]."""
        count = self._num_classes
        return torch.split(sums, [count, count, count, len(sums) - 3 * count])

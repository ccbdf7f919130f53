"""Scoring of predictions, optionally among a subset of classes or with several correct labels per image."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Scores(NamedTuple):
    """The scores of each image of a batch."""

    top1: Tensor  # bool [B]
    top5: Tensor  # bool [B]; True for fewer than five classes
    loss: Tensor  # float32 [B]; -log of the summed probability of the correct labels
    predicted: Tensor  # int64 [B]; the class with the highest score


@dataclass(frozen=True)
class Scoring:
    """The definition of correct predictions and of the loss.

    By default all classes can be predicted, a target is the one correct label, and the loss is the cross entropy.

    Attributes:
        class_mask: bool [C]; masked-out classes are never predicted and get no probability.
        label_sets: int64 [S, L], with short rows padded by -1; a target is then a row index, and each label of the row
            is correct.
    """

    class_mask: Tensor | None = None
    label_sets: Tensor | None = None

    def __call__(self, logits: Tensor, targets: Tensor) -> Scores:
        """Score float32 logits [B, C] against int64 targets [B], without waiting for the device."""
        if self.class_mask is not None:
            logits = logits.masked_fill(~self.class_mask, -math.inf)
        correct = targets[:, None] if self.label_sets is None else self.label_sets[targets]
        top5 = logits.topk(min(5, logits.shape[1])).indices
        hits = (top5[:, :, None] == correct[:, None, :]).any(2)
        log_probabilities = logits.log_softmax(1).gather(1, correct.clamp(min=0)).masked_fill(correct < 0, -math.inf)
        return Scores(hits[:, 0], hits.any(1), -log_probabilities.logsumexp(1), top5[:, 0])


SINGLE_LABEL = Scoring()

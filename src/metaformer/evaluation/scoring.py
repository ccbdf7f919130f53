"""What counts as right: the classes that compete for an image, and the labels that it has."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Scores(NamedTuple):
    """Of each image of a batch."""

    top1: Tensor  # bool [B]
    top5: Tensor  # bool [B]; with fewer than five classes, True
    loss: Tensor  # float32 [B], -log of the probability that the right labels have together


@dataclass(frozen=True)
class Scoring:
    """By default every class competes, a target is the one right label, and the loss is the cross entropy.

    Attributes:
        competing: bool [C]; the other classes are neither predicted nor given any probability.
        label_sets: int64 [S, L], short rows ending in -1; a target is then a row, and each label in it is right.
    """

    competing: Tensor | None = None
    label_sets: Tensor | None = None

    def __call__(self, logits: Tensor, targets: Tensor) -> Scores:
        """Score float32 logits [B, C] against int64 targets [B]; nothing waits for the device."""
        if self.competing is not None:
            logits = logits.masked_fill(~self.competing, -math.inf)
        right = targets[:, None] if self.label_sets is None else self.label_sets[targets]
        best = logits.topk(min(5, logits.shape[1])).indices
        hits = (best[:, :, None] == right[:, None, :]).any(2)
        log_probabilities = logits.log_softmax(1).gather(1, right.clamp(min=0)).masked_fill(right < 0, -math.inf)
        return Scores(hits[:, 0], hits.any(1), -log_probabilities.logsumexp(1))


SINGLE_LABEL = Scoring()

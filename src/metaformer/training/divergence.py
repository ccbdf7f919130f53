"""Checks that end a run whose weights are no longer usable."""

import math

from metaformer.errors import Diverged
from metaformer.interfaces import Row

ADVICE = "lower optimizer.lr, set clip_grad_norm, or use precision=bf16 or fp32"


def check_loss(row: Row, loss: float, skipped_in_a_row: int, limit: int) -> None:
    """Check the training loss and the number of consecutive skipped steps; they are the same on all ranks.

    Args:
        row: the position in training, for the error message.

    Raises:
        Diverged: the loss is not finite, or `limit` consecutive steps were skipped.
    """
    if skipped_in_a_row >= limit:
        what = f"the last {skipped_in_a_row} steps had gradients that are not finite, and were skipped"
    elif not math.isfinite(loss):
        what = f"the loss is {loss}"
    else:
        return
    raise Diverged(f"epoch {row['epoch']}, step {row['step']}: {what}; {ADVICE}")


def check_validation(row: Row, skipped_in_a_row: int) -> None:
    """Check the validation loss. If it is not finite after a skipped step, the weights are unusable, even finite ones.

    Raises:
        Diverged: the loss is not finite, and the last steps were skipped.
    """
    if skipped_in_a_row and not math.isfinite(row["loss"]):
        raise Diverged(
            f"epoch {row['epoch']}, step {row['step']}: the validation loss is {row['loss']} and the last "
            f"{skipped_in_a_row} steps had gradients that are not finite; {ADVICE}"
        )

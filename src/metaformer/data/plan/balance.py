"""Class balance: the number of times that an epoch uses the images of each class."""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from metaformer.data.index.config import Balance
from metaformer.data.plan.draws import Float64, Int64, generator

_BALANCE_STREAM = 3
_POWERS = {Balance.sqrt: 0.5, Balance.uniform: 0.0}


@dataclass(frozen=True, eq=False)
class ClassBalance:
    """Draws of images by class weights n^p, for classes of n images, without replacement as far as possible.

    An epoch has as many draws as images. Draw numbers 0, 1, ... are divided among the classes in proportion to their
    weights. Of the draws of a class, each n use all of its images; the rest is spread evenly over them. Hence both the
    draws of a class and the uses of an image are their expected number, rounded down or up at random.

    Attributes:
        first: int64 [C], the first image of each class; its images are consecutive.
        sizes: int64 [C], number of images of each class, at least 1.
        weights: float64 [C].
    """

    first: Int64
    sizes: Int64
    weights: Float64

    def images(self, draws: Int64, seed: int, epoch: int) -> tuple[Int64, Int64]:
        """Return the image of each draw [D], and how many smaller draws of the epoch have the same image."""
        ends, offsets = _epoch_shares(self, seed, epoch)
        classes = np.searchsorted(ends, draws, side="right")
        starts = np.concatenate([[0], ends])
        sizes, number = self.sizes[classes], draws - starts[classes]
        copies = number // sizes
        in_round = np.minimum(sizes, starts[classes + 1] - starts[classes] - copies * sizes)
        # Integers, so that no image is used twice in a round. With equally likely offsets in [0, sizes), all images
        # are equally likely.
        position = ((number - copies * sizes) * sizes + offsets[classes]) // in_round
        return self.first[classes] + position, copies


def make_balance(balance: Balance, labels: Int64) -> ClassBalance | None:
    """Return the draws for images with these labels [N], in ascending order as in an index; None for `none`."""
    if balance is Balance.none:
        return None
    assert (labels[1:] >= labels[:-1]).all(), "the images of each class must be consecutive"
    sizes = np.bincount(labels)
    first, present = np.cumsum(sizes) - sizes, sizes > 0
    weights: Float64 = sizes[present].astype(np.float64) ** _POWERS[balance]
    return ClassBalance(first[present], sizes[present], weights)


class _Shares(NamedTuple):
    """The division of an epoch's draws among the classes."""

    ends: Int64  # [C], the draw after the last one of each class
    offsets: Int64  # [C], in [0, sizes)


@lru_cache(maxsize=4)
def _epoch_shares(balance: ClassBalance, seed: int, epoch: int) -> _Shares:
    rng = generator(seed, epoch, _BALANCE_STREAM)
    total = int(balance.sizes.sum())
    shares = np.cumsum(balance.weights / balance.weights.sum() * total)
    ends = np.minimum(np.floor(shares + rng.random()), total).astype(np.int64)
    ends[-1] = total  # the sum of the weights is rounded
    return _Shares(ends, rng.integers(balance.sizes))

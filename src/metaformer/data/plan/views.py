"""The views of an epoch: the images that it uses, their order, and how often each is used.

A view is one use of an image in an epoch, with its own augmentation. View v shows image v % num_samples; the first view
of an image has the image's number.
"""

from functools import lru_cache

import numpy as np

from metaformer.data.plan.balance import ClassBalance
from metaformer.data.plan.draws import Int64, generator

_ORDER_STREAM = 1


def views_at(
    slots: Int64, *, seed: int, epoch: int, num_samples: int, repeats: int, balance: ClassBalance | None
) -> Int64:
    """Return the views at the positions `slots` [B] of an epoch. Each draw of an image gives `repeats` views.

    The draws are a permutation of the images or, with `balance`, of the balanced draws.
    """
    draws = epoch_order(seed, epoch, num_samples)[slots // repeats]
    images, copies = draws, np.zeros_like(draws)
    if balance is not None:
        images, copies = balance.images(draws, seed, epoch)
    return images + num_samples * (copies * repeats + slots % repeats)


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, num_samples: int) -> Int64:
    """Return the permutation of an epoch."""
    return generator(seed, epoch, _ORDER_STREAM).permutation(num_samples)

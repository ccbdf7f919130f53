"""Tools that run timm's operations with this project's random numbers instead of their own."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from timm.data import Mixup, mixup
from timm.data import transforms as timm_transforms

from metaformer.data.plan.draws import Float64

Box = tuple[int, int, int, int]  # top, bottom, left, right, as in timm


def papers_box(shape: tuple[int, ...], keep: float, margin: float = 0.0, count: int | None = None) -> Box:
    """Draw cutmix's box as the paper's code did: `cut // 2` pixels to each side of the centre, then clipped.

    timm now adds the last pixel of an odd cut to the far side. The signature is timm's.
    """
    height, width = shape[-2:]
    share = np.sqrt(1 - keep)
    cut_height, cut_width = int(height * share), int(width * share)
    y, x = np.random.randint(0, height), np.random.randint(0, width)
    top, bottom = (int(np.clip(y + side * (cut_height // 2), 0, height)) for side in (-1, 1))
    left, right = (int(np.clip(x + side * (cut_width // 2), 0, width)) for side in (-1, 1))
    return top, bottom, left, right


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Limit torch to one thread, because threads slow down many small tensors, especially beside other programs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextmanager
def papers_mixup(
    rng: np.random.Generator, num_classes: int, kind: type[Mixup] = Mixup, draw_box: Callable[..., Box] = papers_box
) -> Iterator[Mixup]:
    """Provide timm's Mixup with the paper's options and boxes, drawing from `rng` instead of NumPy's global state."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np.random, "rand", rng.random)
        patch.setattr(np.random, "beta", rng.beta)
        patch.setattr(np.random, "randint", rng.integers)
        patch.setattr(mixup, "rand_bbox", draw_box)
        yield kind(0.8, 1.0, prob=1.0, switch_prob=0.5, mode="batch", label_smoothing=0.1, num_classes=num_classes)


class CropNumbers:
    """Replacement for `random` in timm's random resized crop: the plan's numbers of one image, in timm's order.

    Args:
        tries: [T, 2], rows of sqrt(area * aspect) and sqrt(area / aspect).
        position: [2], horizontal and vertical position of the rectangle within its free range, in [0, 1).
    """

    def __init__(self, tries: Float64, position: Float64) -> None:
        pairs = ((width * height, math.log(width / height)) for width, height in tries)
        self._areas_and_aspects = iter([number for pair in pairs for number in pair])
        self._positions = iter(position[::-1])

    def uniform(self, low: float, high: float) -> float:
        """Return an area's share and an aspect's logarithm in turn, both within timm's limits."""
        number = next(self._areas_and_aspects)
        assert low - 1e-12 <= number <= high + 1e-12
        return number

    def randint(self, low: int, high: int) -> int:
        """Return the vertical, then the horizontal position."""
        return low + math.floor(float(next(self._positions)) * (high - low + 1))


@contextmanager
def crop_drawn_from(tries: Float64, position: Float64) -> Iterator[None]:
    """Make timm's random resized crop use these numbers within the block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm_transforms, "random", CropNumbers(tries, position))
        yield

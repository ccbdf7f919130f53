"""Tests of random erasing against timm's, as its loader builds it: images, rectangles and noise."""

import random
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy import stats
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from metaformer.data.device.transform import erase, normalize
from metaformer.data.plan.augmentation import AugmentationConfig
from metaformer.data.plan.plan import EraseDraws, TrainingPlan

IMAGES, SIZE = 12_000, 224
LEAST_P = 1e-3  # of the statistical tests; the draws are fixed


class Rectangles(NamedTuple):
    """Rectangles of the erased images, in pixels."""

    top: np.ndarray
    left: np.ndarray
    height: np.ndarray
    width: np.ndarray

    @property
    def properties(self) -> dict[str, np.ndarray]:
        """The compared properties; a position is a share of the rectangle's free range."""
        return {
            "height": self.height,
            "width": self.width,
            "area": self.height * self.width,
            "aspect": self.height / self.width,
            "vertical position": self.top / (SIZE - self.height),
            "horizontal position": self.left / (SIZE - self.width),
        }


def timms_erasing() -> RandomErasing:
    """Make RandomErasing as timm's PrefetchLoader does for `--reprob 0.25 --remode pixel`."""
    return RandomErasing(probability=0.25, mode="pixel", max_count=1, num_splits=0, device=torch.device("cpu"))


def draws(images: int, size: int) -> EraseDraws:
    """Return the plan's draws for one batch."""
    plan = TrainingPlan(
        num_samples=images,
        global_batch_size=images,
        accumulation_steps=1,
        rank=0,
        world_size=1,
        seed=2,
        image_size=size,
        crop_pct=0.9,
        augmentation=AugmentationConfig(),
    ).batch(1, 0)
    assert plan.erase is not None
    return plan.erase


@pytest.fixture(scope="module")
def ours() -> Rectangles:
    top, left, bottom, right = draws(IMAGES, SIZE).boxes.T
    return Rectangles(top, left, bottom - top, right - left)


@pytest.fixture(scope="module")
def timms() -> Rectangles:
    """timm's rectangles, measured on single-channel images of zeros."""
    random.seed(0)
    torch.manual_seed(0)
    erasing, found = timms_erasing(), []
    for _ in range(IMAGES // 500):
        changed = erasing(torch.zeros(500, 1, SIZE, SIZE))[:, 0] != 0
        rows, columns = changed.any(2).numpy(), changed.any(1).numpy()
        for row, column in zip(rows[rows.any(1)], columns[rows.any(1)], strict=True):
            (y,), (x,) = row.nonzero(), column.nonzero()
            found.append((y[0], x[0], y[-1] - y[0] + 1, x[-1] - x[0] + 1))
    return Rectangles(*np.array(found).T)


def test_a_quarter_of_the_images_is_erased(ours: Rectangles, timms: Rectangles) -> None:
    """In both implementations, the number of erased images is binomial with probability .25."""
    for rectangles in (ours, timms):
        assert stats.binomtest(len(rectangles.top), IMAGES, 0.25).pvalue > LEAST_P


def test_rectangles_are_distributed_as_timms(ours: Rectangles, timms: Rectangles) -> None:
    """Size, area, aspect and position of about 3000 rectangles each pass two-sample Kolmogorov-Smirnov tests."""
    for name, values in ours.properties.items():
        assert stats.ks_2samp(values, timms.properties[name]).pvalue > LEAST_P, name


def test_rectangles_keep_timms_bounds(ours: Rectangles, timms: Rectangles) -> None:
    """In both, the area is .02 to 1/3 of the image and the aspect .3 to 1/.3, except for rounding sides to pixels."""
    for rectangles in (ours, timms):
        area, aspect = rectangles.properties["area"] / SIZE**2, rectangles.properties["aspect"]
        assert 0.0195 < area.min() < 0.025
        assert 0.325 < area.max() < 0.336
        assert 0.29 < aspect.min() < 0.32
        assert 3.1 < aspect.max() < 3.45
        assert (rectangles.top + rectangles.height).max() == SIZE
        assert (rectangles.left + rectangles.width).max() == SIZE


def test_rectangles_do_not_depend_on_their_position(ours: Rectangles) -> None:
    """Area, aspect and the two position coordinates of a rectangle are independent."""
    names = ("area", "aspect", "vertical position", "horizontal position")
    ranks = stats.spearmanr(np.stack([ours.properties[name] for name in names], axis=1))
    assert ranks.pvalue[np.triu_indices(4, 1)].min() > LEAST_P


def erased_batch() -> tuple[Tensor, Tensor, Tensor]:
    """Return 400 images before and after erasing, and a mask of the rectangles: bool [B, 1, S, S]."""
    size = 64
    plan = draws(400, size)
    pixels = torch.randint(0, 256, (400, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    inside = torch.zeros(400, 1, size, size, dtype=torch.bool)
    for row, (top, left, bottom, right) in zip(plan.rows.tolist(), plan.boxes.tolist(), strict=True):
        inside[row, :, top:bottom, left:right] = True
    before = normalize(pixels)
    return before, erase(before.clone(), plan), inside


def test_outside_of_the_rectangle_nothing_changes() -> None:
    """In a whole batch, exactly the pixels of the rectangles change, in all three channels."""
    before, after, inside = erased_batch()
    assert torch.equal(after != before, inside.expand_as(before))
    assert 80 < inside.flatten(1).any(1).sum() < 120


def test_noise_is_standard_normal_as_timms() -> None:
    """The noise has mean 0, standard deviation 1, and passes tests against the normal distribution and timm's noise."""
    _, after, inside = erased_batch()
    noise = after[inside.expand_as(after)].double().numpy()
    assert len(noise) > 100_000
    assert abs(noise.mean()) < 4 / len(noise) ** 0.5
    assert noise.std() == pytest.approx(1, abs=4 / (2 * len(noise)) ** 0.5)
    assert stats.kstest(noise, stats.norm.cdf).pvalue > LEAST_P
    random.seed(1)
    torch.manual_seed(1)
    theirs = timms_erasing()(torch.zeros(400, 3, 64, 64))
    assert stats.ks_2samp(noise, theirs[theirs != 0].double().numpy()).pvalue > LEAST_P


def test_noise_is_drawn_for_each_pixel_and_channel() -> None:
    """Channels of a pixel, and neighbouring pixels, are independent: a rectangle is not filled with one colour."""
    _, after, inside = erased_batch()
    channels = after.movedim(1, -1)[inside[:, 0]].double().numpy()
    bound = 4.5 / len(channels) ** 0.5
    assert np.abs(np.corrcoef(channels.T) - np.eye(3)).max() < bound
    pairs = inside[..., 1:] & inside[..., :-1]
    neighbours = [half[pairs.expand_as(half)].double().numpy() for half in (after[..., 1:], after[..., :-1])]
    assert abs(np.corrcoef(neighbours)[0, 1]) < bound

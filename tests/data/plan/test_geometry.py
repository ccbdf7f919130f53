"""Tests of the crop and resize geometry."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import CenterCrop, InterpolationMode, RandomResizedCrop, Resize

from metaformer.data.plan.augmentation import AugmentationConfig
from metaformer.data.plan.geometry import evaluation_resize, random_resized_crop, resize_and_center_crop
from metaformer.data.plan.plan import TrainingPlan
from tests.data.conftest import picture

ASPECTS = (3 / 4, 4 / 3)
SIDES = st.integers(1, 3000)


@pytest.mark.parametrize("width", [30, 31, 37, 64, 101, 333])
@pytest.mark.parametrize("height", [30, 33, 48, 101])
@pytest.mark.parametrize(("resize_to", "image_size"), [(35, 32), (36, 32), (33, 33), (38, 31)])
def test_evaluation_takes_torchvisions_pixels(width: int, height: int, resize_to: int, image_size: int) -> None:
    """Resizing and cropping a PIL image with this geometry gives the pixels of torchvision's Resize and CenterCrop."""
    image = picture(width, height, seed=width * height)
    expected = CenterCrop(image_size)(Resize(resize_to, InterpolationMode.BICUBIC)(image))
    resize = resize_and_center_crop(width, height, resize_to, image_size)
    resized = image.resize((resize.width, resize.height), Image.Resampling.BICUBIC)
    box = (resize.left, resize.top, resize.left + image_size, resize.top + image_size)
    assert np.array_equal(np.asarray(resized.crop(box)), np.asarray(expected))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(width=SIDES, height=SIDES, size=st.sampled_from([(248, 224), (235, 224), (224, 224), (107, 96)]))
def test_evaluation_crop_lies_inside(width: int, height: int, size: tuple[int, int]) -> None:
    """For any image, the short side has the requested length, the aspect is kept and the crop is inside the image."""
    resize = resize_and_center_crop(width, height, *size)
    assert min(resize.width, resize.height) == size[0]
    assert max(resize.width, resize.height) == size[0] * max(width, height) // min(width, height)
    assert 0 <= resize.left <= resize.width - size[1]
    assert 0 <= resize.top <= resize.height - size[1]


@pytest.mark.parametrize(("image_size", "crop_pct", "expected"), [(224, 0.9, 248), (224, 0.95, 235), (64, 1.0, 64)])
def test_evaluation_resize(image_size: int, crop_pct: float, expected: int) -> None:
    """The short side before the crop is floor(size / crop_pct), as in timm."""
    assert evaluation_resize(image_size, crop_pct) == expected


@pytest.mark.parametrize("size", [(1, 1), (1000, 1), (1, 1000), (97, 13), (13, 97), (301, 225), (225, 301), (64, 64)])
def test_fallback_equals_torchvisions(size: tuple[int, int]) -> None:
    """If no try fits, the crop is torchvision's: the largest centred one with an aspect of 3/4 to 4/3."""
    too_large = np.full((10, 2), 2.0)
    box = random_resized_crop(too_large, np.array([0.3, 0.9]), ASPECTS, *size)
    # An area larger than the image never fits, so torchvision also uses its fallback.
    top, left, height, width = RandomResizedCrop.get_params(Image.new("L", size), scale=[4, 5], ratio=list(ASPECTS))
    assert box == (left, top, width, height)


def test_first_try_that_fits_is_taken() -> None:
    """Tries that are too wide, too high or empty are skipped; sides are rounded to the nearest pixel."""
    tries = np.array([[1.3, 0.5], [0.5, 1.3], [0.001, 0.5], [0.2549, 0.5051], [0.1, 0.1]])
    assert random_resized_crop(tries, np.array([0.0, 0.0]), ASPECTS, 100, 100) == (0, 0, 25, 51)
    assert random_resized_crop(tries, np.array([0.999999, 0.5]), ASPECTS, 100, 100) == (75, 25, 25, 51)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(width=SIDES, height=SIDES, seed=st.integers(0, 1000), epoch=st.integers(0, 400))
def test_training_crop_lies_inside(width: int, height: int, seed: int, epoch: int) -> None:
    """For images of any size, the drawn crop has at least one pixel and is inside the image."""
    crop = (
        TrainingPlan(
            num_samples=4,
            global_batch_size=4,
            accumulation_steps=1,
            rank=0,
            world_size=1,
            seed=seed,
            image_size=224,
            crop_pct=0.9,
            augmentation=AugmentationConfig(),
        )
        .batch(epoch, 0)
        .crop
    )
    assert crop is not None
    box = random_resized_crop(crop.tries[0], crop.position[0], crop.aspects, width, height)
    assert box.width > 0
    assert box.height > 0
    assert 0 <= box.left <= width - box.width
    assert 0 <= box.top <= height - box.height


@pytest.mark.parametrize("size", [(500, 375), (300, 60)])
def test_training_crops_are_distributed_as_torchvisions(size: tuple[int, int]) -> None:
    """Left, top, width and height of many crops are distributed as those of torchvision's RandomResizedCrop."""
    count = 3000
    crop = (
        TrainingPlan(
            num_samples=count,
            global_batch_size=count,
            accumulation_steps=1,
            rank=0,
            world_size=1,
            seed=0,
            image_size=224,
            crop_pct=0.9,
            augmentation=AugmentationConfig(),
        )
        .batch(0, 0)
        .crop
    )
    assert crop is not None
    ours = np.array([random_resized_crop(t, p, ASPECTS, *size) for t, p in zip(crop.tries, crop.position, strict=True)])
    torch.manual_seed(0)
    image = Image.new("L", size)
    theirs = [RandomResizedCrop.get_params(image, scale=[0.08, 1.0], ratio=list(ASPECTS)) for _ in range(count)]
    for one, other in zip(ours.T, np.array(theirs)[:, [1, 0, 3, 2]].T, strict=True):
        grid = np.unique(np.concatenate([one, other]))
        shares = [np.searchsorted(np.sort(values), grid, side="right") / count for values in (one, other)]
        assert np.abs(shares[0] - shares[1]).max() < 2.2 * (2 / count) ** 0.5  # Kolmogorov-Smirnov test, 1e-4

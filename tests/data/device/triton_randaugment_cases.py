"""Tests of RandAugment by Triton against the tensor version on a CPU, shared by two test modules.

`test_choice.py` runs them in the Triton interpreter, and `test_triton_kernel_gpu.py` runs them compiled on a GPU. All
values must be equal.
"""

import os

import numpy as np
import pytest
import torch
from torch import Tensor

from metaformer.data.device.choice import augment_by_triton, find_randaugment_fault
from metaformer.data.device.randaugment import apply_to_batch
from metaformer.data.plan.augmentation import RandAugmentConfig
from metaformer.data.plan.randaugment import DRAWS_PER_OPERATION, OPERATIONS, RandAugmentDraws, draw_operations
from tests.data.conftest import picture

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")


def pictures(height: int, width: int) -> Tensor:
    """Return uint8 [6, 3, H, W], channels_last: smooth, noisy, dark, two values, few values, and one colour."""
    smooth = np.asarray(picture(width, height, seed=1))
    noisy = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    one_colour = np.broadcast_to(np.array([0, 90, 255], np.uint8), smooth.shape)
    arrays = [smooth, noisy, smooth // 4 + 9, noisy // 128 * 200, smooth // 64 * 60, one_colour]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def assert_equal(images: Tensor, draws: RandAugmentDraws) -> None:
    """Compare the two versions, and check that the images are not modified."""
    given = images.to(DEVICE)
    result, expected = augment_by_triton(given, draws), apply_to_batch(images, draws)
    assert result.dtype == torch.uint8
    assert result.is_contiguous(memory_format=torch.channels_last)
    differs = (result.cpu() != expected).flatten(1).any(dim=1).nonzero().flatten().tolist()
    assert not differs, [draws.operations_for(row) for row in differs]
    assert torch.equal(given.cpu(), images)


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation(name: str) -> None:
    """One operation on each image, with both signs and filters, and magnitudes from 0 to 10."""
    images = pictures(13, 11).repeat(2, 1, 1, 1)
    number = np.arange(len(images))[:, None]
    position = np.full_like(number, OPERATIONS.index(name))
    assert_equal(images, RandAugmentDraws(position, number * 10 / 11, number % 2 == 0, number < 6))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 9), (41, 3), (16, 17)])
def test_drawn_sequences(height: int, width: int) -> None:
    """Three drawn operations in their order, some of which are not applied, also on small sides and with a fill."""
    images = pictures(height, width).repeat(3, 1, 1, 1)
    uniform = np.random.default_rng(height).random((len(images), 3, DRAWS_PER_OPERATION))
    draws = draw_operations(RandAugmentConfig(probability=0.8), uniform, fill=(128, 3, 250))
    assert (draws.operation < 0).any()
    assert_equal(images, draws)


def test_statistics_of_many_pixels() -> None:
    """Statistics of images that are read in several steps; equalize changes nothing in fewer than 255 pixels."""
    names = ("AutoContrast", "Equalize", "ContrastIncreasing")
    operation = np.array([[OPERATIONS.index(name)] for name in names])
    draws = RandAugmentDraws(operation, np.full((3, 1), 9.0), np.full((3, 1), True), np.full((3, 1), True))
    assert_equal(pictures(33, 32)[:3], draws)


def test_one_image_and_no_operations() -> None:
    """A batch of one image, and batches to which no operation is applied, or for which none is drawn."""
    images = pictures(7, 5)
    uniform = np.random.default_rng(0).random((6, 2, DRAWS_PER_OPERATION))
    assert_equal(images[:1], draw_operations(RandAugmentConfig(probability=1.0), uniform[:1]))
    assert_equal(images, draw_operations(RandAugmentConfig(probability=0.0), uniform))
    assert_equal(images, draw_operations(RandAugmentConfig(), uniform[:, :0]))


def test_self_check_of_randaugment_passes() -> None:
    """The check finds no fault in the kernels."""
    assert find_randaugment_fault(DEVICE, 9) is None

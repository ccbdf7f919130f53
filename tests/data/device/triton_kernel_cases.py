"""Tests of the Triton transform against the plain transform, shared by two test modules.

`test_choice.py` runs them in the Triton interpreter, and `test_triton_kernel_gpu.py` runs them compiled on a GPU.
"""

import os

import numpy as np
import pytest
import torch
from torch import Tensor

from metaformer.data.device.choice import find_fault, transform_by_triton
from metaformer.data.device.transform import IMAGENET, transform_plainly
from metaformer.data.plan.augmentation import AugmentationConfig
from metaformer.data.plan.plan import BatchPlan, EraseDraws, MixDraws, TrainingPlan

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")


def images(batch: int, height: int, width: int) -> Tensor:
    pixels = torch.randint(
        256, (batch, 3, height, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    return pixels.to(DEVICE, memory_format=torch.channels_last)


def plan_with(batch: int, mixing: MixDraws | None, erasing: EraseDraws | None) -> BatchPlan:
    plan = TrainingPlan(
        num_samples=batch,
        global_batch_size=batch,
        accumulation_steps=1,
        rank=0,
        world_size=1,
        seed=0,
        image_size=32,
        crop_pct=0.9,
        augmentation=AugmentationConfig(),
    ).batch(0, 0)
    return BatchPlan(**{**plan.__dict__, "mix": mixing, "erase": erasing})


MIXING = {
    "none": None,
    "mixup": MixDraws(np.array([0.3]), np.zeros((1, 4), np.int64), np.array([0.3])),
    "cutmix": MixDraws(np.array([1.0]), np.array([[2, 3, 9, 16]]), np.array([0.6])),
    "groups": MixDraws(np.array([0.3, 1.0]), np.array([[0, 0, 0, 0], [0, 0, 40, 7]]), np.array([0.3, 0.5])),
}
ERASING = {
    "none": None,
    "no image": EraseDraws(np.zeros(0, np.int64), np.zeros((0, 4), np.int64), np.zeros(0, np.int64)),
    "some": EraseDraws(
        np.array([5, 0, 2]), np.array([[0, 2, 7, 16], [5, 5, 5, 6], [0, 0, 60, 60]]), np.array([0, 7, 2**32 - 1])
    ),
}


@pytest.mark.parametrize("erasing", ERASING)
@pytest.mark.parametrize("mixing", MIXING)
@pytest.mark.parametrize(("height", "width"), [(32, 32), (37, 21)])
def test_images_are_the_plain_ones(mixing: str, erasing: str, height: int, width: int) -> None:
    """Both transforms give equal values except for rounding, also for boxes that are empty or exceed the image."""
    pixels, plan = images(6, height, width), plan_with(6, MIXING[mixing], ERASING[erasing])
    before = pixels.clone()
    result, expected = transform_by_triton(pixels, plan, IMAGENET), transform_plainly(pixels, plan, IMAGENET)
    assert result.dtype == torch.float32
    assert result.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(pixels, before)


def test_self_check_passes() -> None:
    """The check finds no fault in the kernel."""
    assert find_fault(DEVICE, 37) is None

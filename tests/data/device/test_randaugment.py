"""Tests of RandAugment on batches of tensors against PIL's operations."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from metaformer.data.device.randaugment import BATCH_FUNCTIONS, apply_to_batch
from metaformer.data.plan.randaugment import OPERATIONS, RandAugmentDraws, apply_operations
from tests.data.conftest import picture

WARPS = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")


@pytest.fixture(scope="module")
def images() -> Tensor:
    """uint8 [7, 3, 40, 40]: smooth, noisy, dark, two values, few values, gray, and one colour."""
    rng = np.random.default_rng(0)
    smooth = np.asarray(picture(40, 40, seed=1))
    noisy = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
    gray = np.asarray(picture(40, 40, seed=2).convert("L").convert("RGB"))
    one_colour = np.broadcast_to(np.array([0, 90, 255], np.uint8), (40, 40, 3))
    arrays = [smooth, noisy, smooth // 4, noisy // 128 * 200, smooth // 64 * 60, gray, one_colour]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def draws(rows: int, **columns: object) -> RandAugmentDraws:
    """Repeat the same operations for every row; each column is a list with one value per operation."""
    operation, magnitude, negative, bicubic = (np.tile(np.asarray(values), (rows, 1)) for values in columns.values())
    return RandAugmentDraws(operation, magnitude, negative, bicubic)


def with_pil(images: Tensor, wanted: RandAugmentDraws) -> Tensor:
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
    done = [apply_operations(Image.fromarray(array), wanted.operations_for(row)) for row, array in enumerate(pixels)]
    return torch.from_numpy(np.stack([np.asarray(image) for image in done])).permute(0, 3, 1, 2)


@pytest.mark.parametrize("magnitude", [0.0, 2.5, 6.0, 9.0, 9.61, 10.0])
@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_pils(images: Tensor, name: str, magnitude: float) -> None:
    """For both signs and filters, all pixels equal PIL's; warps differ by at most 1, in few pixels."""
    for negative in (False, True):
        for bicubic in (False, True):
            wanted = draws(7, o=[OPERATIONS.index(name)], m=[magnitude], n=[negative], b=[bicubic])
            difference = (apply_to_batch(images, wanted).int() - with_pil(images, wanted).int()).abs()
            if name in WARPS:
                assert difference.max() <= 1
                assert difference.float().mean() < 0.1
            else:
                assert not difference.any()


def test_every_operation_is_implemented() -> None:
    """All operations of the plan have a batch function."""
    assert set(BATCH_FUNCTIONS) == set(OPERATIONS)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_batches_of_many_operations(images: Tensor, memory_format: torch.memory_format) -> None:
    """Two operations per image, different for each, give PIL's result in their order; the input is not modified."""
    rng = np.random.default_rng(3)
    batch = images.repeat(20, 1, 1, 1).contiguous(memory_format=memory_format)
    shape = (len(batch), 2)
    wanted = RandAugmentDraws(
        rng.integers(-1, len(OPERATIONS), shape),
        rng.uniform(7, 10, shape),
        rng.random(shape) < 0.5,
        rng.random(shape) < 0.5,
        fill=(128, 3, 250),
    )
    before = batch.clone()
    augmented = apply_to_batch(batch, wanted)
    assert torch.equal(batch, before)
    assert augmented.is_contiguous(memory_format=memory_format)
    difference = (augmented.int() - with_pil(batch, wanted).int()).abs().float()
    exact = torch.from_numpy(~np.isin(wanted.operation, [OPERATIONS.index(name) for name in WARPS]).any(axis=1))
    assert exact.sum() > 30
    assert not difference[exact].any()
    assert difference.mean() < 0.1, "later operations amplify a warp's error of 1"


def test_no_operations_leave_the_images(images: Tensor) -> None:
    """Images without operations are returned unchanged."""
    nothing = draws(7, o=[-1, -1], m=[9.0, 9.0], n=[False, False], b=[False, False])
    assert torch.equal(apply_to_batch(images, nothing), images)

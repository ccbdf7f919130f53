"""Normalising, mixing and erasing training images in one pass by Triton, and whether a GPU does it rightly."""

import itertools

import numpy as np
import torch
from torch import Tensor

from metaformer.data.device.transform import (
    IMAGENET,
    ColourStatistics,
    as_tensor,
    mean_and_std,
    transform_plainly,
)
from metaformer.data.plan.augmentation import AugmentationConfig
from metaformer.data.plan.plan import BatchPlan, TrainingPlan
from metaformer.kernel_check import try_kernels

TOLERANCE = 1e-3  # of a value in standard deviations: noise goes through log and cos, whose last bits differ


def transform_by_triton(images: Tensor, plan: BatchPlan, statistics: ColourStatistics) -> Tensor:
    """As `transform_plainly`, for channels_last images."""
    from metaformer.data.device import triton_kernel  # imports triton, which torch's builds for CPUs lack

    mixing = erasing = None
    if plan.mix is not None:
        mixing = (as_tensor(images, plan.mix.keep), as_tensor(images, plan.mix.box, torch.int64))
    if plan.erase is not None and len(plan.erase.rows):
        places = np.full(len(images), -1)
        places[plan.erase.rows] = np.arange(len(plan.erase.rows))
        draws = (places, plan.erase.boxes, plan.erase.noise_keys)
        erasing = tuple(as_tensor(images, values, torch.int64) for values in draws)
    return triton_kernel.transform(images, *mean_and_std(statistics, images.device), mixing, erasing)


def find_fault(device: torch.device, image_size: int) -> str | None:
    """Compare both ways on batches that are mixed and erased, and on some that are not.

    Args:
        image_size: of the images to come, in pixels: Triton specialises its kernel by it.

    Returns:
        What is wrong, in a few words; None where nothing is.
    """
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (16, 3, image_size, image_size), dtype=torch.uint8, generator=generator)
    pixels = pixels.to(device, memory_format=torch.channels_last)
    augmentations = [
        AugmentationConfig(erase_probability=0.7, mix_group_size=4),
        AugmentationConfig(erase_probability=0.7),
        AugmentationConfig(erase_probability=0, mix_probability=0),
    ]

    def compare() -> str | None:
        for augmentation, position in itertools.product(augmentations, range(4)):
            plan = TrainingPlan(64, 16, 1, 0, 1, 0, image_size, 0.9, augmentation).batch(0, position)
            found, expected = (way(pixels, plan, IMAGENET) for way in (transform_by_triton, transform_plainly))
            error = float((found - expected).abs().max())
            if not error < TOLERANCE:
                return f"it differs from the plain one by {error:.2g} at {image_size} px"
        return None

    return try_kernels(compare)

"""The fused Triton transform of training images, and a check of its results on a GPU."""

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

TOLERANCE = 1e-3  # in standard deviations; the last bits of log and cos, which the noise uses, differ


def transform_by_triton(images: Tensor, plan: BatchPlan, statistics: ColourStatistics) -> Tensor:
    """Normalize, mix and erase channels_last images in one pass, with the result of `transform_plainly`."""
    from metaformer.data.device import triton_kernel  # imports triton, which CPU builds of torch lack

    mixing = erasing = None
    if plan.mix is not None:
        mixing = (as_tensor(images, plan.mix.keep), as_tensor(images, plan.mix.box, torch.int64))
    if plan.erase is not None and len(plan.erase.rows):
        erase_index = np.full(len(images), -1)
        erase_index[plan.erase.rows] = np.arange(len(plan.erase.rows))
        draws = (erase_index, plan.erase.boxes, plan.erase.noise_keys)
        erasing = tuple(as_tensor(images, values, torch.int64) for values in draws)
    return triton_kernel.transform(images, *mean_and_std(statistics, images.device), mixing, erasing)


def find_fault(device: torch.device, image_size: int) -> str | None:
    """Compare the Triton and the plain transform on batches with and without mixing and erasing.

    Args:
        image_size: size of the training images in pixels, for which Triton specializes its kernel.

    Returns:
        A short description of the fault, or None if there is none.
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
        """Return how the first differing batch differs, or None."""
        for augmentation, position in itertools.product(augmentations, range(4)):
            plan = TrainingPlan(
                num_samples=64,
                global_batch_size=16,
                accumulation_steps=1,
                rank=0,
                world_size=1,
                seed=0,
                image_size=image_size,
                crop_pct=0.9,
                augmentation=augmentation,
            ).batch(0, position)
            result = transform_by_triton(pixels, plan, IMAGENET)
            expected = transform_plainly(pixels, plan, IMAGENET)
            error = float((result - expected).abs().max())
            if not error < TOLERANCE:
                return f"it differs from the plain transform by {error:.2g} at {image_size} px"
        return None

    return try_kernels(compare)

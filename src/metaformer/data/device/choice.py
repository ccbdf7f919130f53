"""The fused Triton transform and RandAugment of training images, and checks of their results on a GPU."""

import itertools

import numpy as np
import torch
from torch import Tensor

from metaformer.data.device.randaugment import apply_to_batch
from metaformer.data.device.transform import (
    IMAGENET,
    ColourStatistics,
    as_tensor,
    mean_and_std,
    transform_plainly,
)
from metaformer.data.plan.augmentation import AugmentationConfig
from metaformer.data.plan.plan import BatchPlan, TrainingPlan
from metaformer.data.plan.randaugment import OPERATIONS, RandAugmentDraws
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


def augment_by_triton(images: Tensor, draws: RandAugmentDraws) -> Tensor:
    """Augment channels_last images in two kernels per operation, with the values of `apply_to_batch` on a CPU."""
    from metaformer.data.device import triton_randaugment  # imports triton, which CPU builds of torch lack

    return triton_randaugment.apply_to_batch(images, draws)


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


def find_randaugment_fault(device: torch.device, image_size: int) -> str | None:
    """Compare RandAugment by Triton with the tensor version on a CPU, for every operation, sign and filter.

    All values must be equal.

    Args:
        image_size: size of the training images in pixels, for which Triton specializes its kernels.

    Returns:
        A short description of the fault, or None if there is none.
    """
    generator = torch.Generator().manual_seed(0)
    number = np.arange(4 * len(OPERATIONS))  # of an image
    pixels = torch.randint(256, (len(number), 3, image_size, image_size), dtype=torch.uint8, generator=generator)
    pixels //= torch.arange(1, 5, dtype=torch.uint8).repeat(len(OPERATIONS)).view(-1, 1, 1, 1)  # darker ones have gaps
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    draws = RandAugmentDraws(
        operation=np.stack([number % len(OPERATIONS), number // 4], axis=1),
        magnitude=np.stack([10 - number / len(number), 10 * number / len(number)], axis=1),
        negative=np.stack([number // len(OPERATIONS) % 2 == 0, number % 2 == 0], axis=1),
        bicubic=np.stack([number // len(OPERATIONS) < 2, number % 4 < 2], axis=1),
    )

    def compare() -> str | None:
        """Return which images differ, or None."""
        differs = augment_by_triton(pixels.to(device), draws).cpu() != apply_to_batch(pixels, draws)
        rows = differs.flatten(1).any(dim=1).nonzero().flatten().tolist()
        if not rows:
            return None
        names = " and ".join(operation.name for operation in draws.operations_for(rows[0]))
        count = f"{len(rows)} of {len(pixels)} images"
        return f"it differs from the plain RandAugment in {count} at {image_size} px, such as {names}"

    return try_kernels(compare)
